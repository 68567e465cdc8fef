"""Published static methods, one file each, steps numbered as published."""
