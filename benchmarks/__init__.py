"""Side by side with peers, one command each; nothing here is a test."""
