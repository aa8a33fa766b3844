"""What every trainer shares: the folder of a run (`run`), several processes (`parallel`), less memory (`memory`)."""
