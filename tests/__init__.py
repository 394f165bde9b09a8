"""Tests of the installed fastbn; the folders are the layers, a file in them a promise."""
