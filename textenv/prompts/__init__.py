"""The life of a prompt: where it comes from, its tokens, when it is played."""
