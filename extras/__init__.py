"""What needs packages beside requirements.txt, and what few readers look for: cards, DeBERTa, 8 bits."""
