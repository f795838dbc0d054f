"""The program `fusionops`: add against concat, fused against materialised, on real shapes. No part of the library."""
