"""`penstock batch`: a file of prompts in, results in its order out."""
