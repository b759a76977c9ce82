"""What adapters of torch programs share."""
