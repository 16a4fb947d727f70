"""Networks from uint8 images to features."""
