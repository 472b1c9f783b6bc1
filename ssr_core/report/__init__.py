"""What statistics tell before any merge, in numbers and in words."""
