"""What every trainer shares: the folder of a run (`run`), several processes (`parallel`), less memory (`memory`), the
learning rate (`rate`), the weights' moving average (`average`), pictures on the way (`samples`)."""
