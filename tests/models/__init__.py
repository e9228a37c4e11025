"""Tests of the models' parts. A package, so that a file may be named as one among the tests of the weights is."""
