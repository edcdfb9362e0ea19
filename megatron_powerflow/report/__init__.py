"""What came out of the runs? One page and its pictures, from run folders alone."""
