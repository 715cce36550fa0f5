"""What makes the embedded model `tiny`.

Its autoencoder, its speech encoder, its transformer, in that order.
"""
