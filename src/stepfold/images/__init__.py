"""Folders of pictures with captions, for the methods that need images."""
