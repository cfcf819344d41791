"""What can wait: file formats (tokenizers, images, adapters), downloads, devices, processes, tables, cards, DeBERTa."""
