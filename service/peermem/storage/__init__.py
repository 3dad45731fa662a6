"""Files and block devices of this host, as loads and stores of regions use them."""
