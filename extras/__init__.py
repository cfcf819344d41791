"""What can wait: file formats (tokenizers, images, adapters), downloads, devices, processes, what ran, tables, cards,
pictures, DeBERTa, and a GPU that does not exist."""
