"""What a run says: reads its files, computes nothing."""
