"""Small worlds with exact checkers: training data, rewards and scores."""
