"""Interactive play: the session, and the window and the web page that show it."""
