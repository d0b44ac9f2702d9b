"""Generation: sampling settings, sequences on one cache, images scale by scale, likelihoods."""
