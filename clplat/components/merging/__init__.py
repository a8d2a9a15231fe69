"""What is done to the weights that a strategy has trained when a learn experience ends: key `merge`, one file a method.

The file's stem is the method's name; a leading underscore marks what they share.
"""
