"""The data build on synthetic documents."""
