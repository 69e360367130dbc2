//! Maps by numbers that this agent hands out itself: nobody can choose them so that they collide, and
//! spreading them costs one multiplication. A plan looks some twenty times for each Service.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map by such numbers.
pub(super) type ByNumber<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// Spreads one number (Fibonacci hashing: D. Knuth, The Art of Computer Programming 3, 6.4).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        let mixed = self.0.rotate_left(5) ^ u64::from(number);
        self.0 = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        // The table looks at the lowest bits and at the highest ones.
        self.0 ^ (self.0 >> 32)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::BuildHasher;

    use super::*;

    #[test]
    fn neighbours_and_multiples_fall_into_places_of_their_own() {
        for step in [1, 3, 8, 1024, 65_536] {
            let hash =
                |number: u32| BuildHasherDefault::<NumberHasher>::new().hash_one(number * step);
            let low: HashSet<u64> = (0..4096).map(|number| hash(number) & 0xffff).collect();
            let high: HashSet<u64> = (0..4096).map(|number| hash(number) >> 57).collect();
            assert!(low.len() > 3500, "step {step}: {} of 4096", low.len());
            assert_eq!(high.len(), 128, "step {step}");
        }
    }
}
