"""What needs packages beside requirements.txt, and what few readers look for: DeBERTa, matrices in 8 bits."""
