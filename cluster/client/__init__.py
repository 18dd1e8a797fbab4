"""How a door or a tool talks to a sheep: sessions, volumes, administration."""
