"""Files as data: whoever wrote them."""
