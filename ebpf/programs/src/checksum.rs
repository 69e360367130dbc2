//! The Internet checksum (RFC 1071), and its change when some of what it covers changes (RFC 1624).

/// What a sum changes by, where one word becomes another.
#[inline(always)]
pub fn difference(from: u32, to: u32) -> u64 {
    u64::from(!from) + u64::from(to)
}

/// A checksum after such a change of what it covers (RFC 1624).
#[inline(always)]
pub fn mended(sum: u16, change: u64) -> u16 {
    !folded(u64::from(!sum) + change)
}

/// The ones' complement sum of all 16-bit words of this one.
#[inline(always)]
pub fn folded(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}
