"""Small models, prompts and held-out texts that come with the package."""
