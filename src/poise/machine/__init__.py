"""What runs where: devices and links, models, curves."""
