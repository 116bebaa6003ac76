"""Search spaces as data: which axes may shrink, to what, and which formats a block may take."""
