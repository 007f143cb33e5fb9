"""The grammar of reviews: its words, a writer and a parser that share them."""
