"""A service of the tests: nothing but migrations."""
