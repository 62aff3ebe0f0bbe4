"""What trains and what generates: the training backends, the engines, and the weight update between them."""
