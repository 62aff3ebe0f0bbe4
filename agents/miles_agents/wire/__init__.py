"""The wire: envelopes, msgpack bodies, reliable sessions, and the two transports below them."""
