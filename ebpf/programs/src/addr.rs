//! Addresses, compared and copied word by word: of anything else the compiler makes a call of a loop over bytes.

use core::ptr::{read_volatile, write_volatile};

use ebpf_maps::services::Addr;

/// Equality.
#[inline(always)]
pub fn same(a: &Addr, b: &Addr) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

/// A copy.
#[inline(always)]
pub fn set(to: &mut Addr, from: &Addr) {
    let mut word = 0;
    while word < from.len() {
        // SAFETY: references to words; volatile, so that the compiler makes no call of it.
        unsafe { write_volatile(&mut to[word], read_volatile(&from[word])) };
        word += 1;
    }
}
