"""A study: what was asked, the stages that answer it, and the folder that holds the answers."""
