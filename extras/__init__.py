"""What needs packages beside requirements.txt, and families of models that few readers want."""
