"""Generation: settings of sampling, sequences on one cache, images scale by scale, likelihoods."""
