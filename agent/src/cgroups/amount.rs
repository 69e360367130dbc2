//! Reads the amounts in resource lists (`250m`, `64Mi`, `1e3`): non-negative, rounded up.
//!
//! The API has validated them; what cannot be read here was never accepted there.

/// Thousandths: `250m` is 250, `2` is 2000. None when it is no such amount or does not fit.
pub fn millis(text: &str) -> Option<u64> {
    scaled(text, 1000)
}

/// Whole units, bytes for memory: `64Mi` is 67108864; a fraction counts as one more.
pub fn value(text: &str) -> Option<u64> {
    scaled(text, 1)
}

/// `text` times `scale`, rounded up; exact in 128 bits.
fn scaled(text: &str, scale: u128) -> Option<u64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || fraction.len() > 12 {
        return None;
    }
    let mantissa: u128 = format!("0{whole}{fraction}").parse().ok()?;
    let (multiplier, divisor) = suffix_factor(suffix)?;
    let numerator = mantissa.checked_mul(multiplier)?.checked_mul(scale)?;
    let divisor = divisor.checked_mul(10u128.checked_pow(fraction.len() as u32)?)?;
    u64::try_from(numerator.div_ceil(divisor)).ok()
}

/// Multiplier and divisor of a suffix: binary, decimal, or a decimal exponent.
fn suffix_factor(suffix: &str) -> Option<(u128, u128)> {
    let power = |base: u128, exponent: u32| base.checked_pow(exponent);
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "Ki" => (1024, 1),
        "M" | "Mi" | "G" | "Gi" | "T" | "Ti" | "P" | "Pi" | "E" | "Ei" => {
            let exponent = 2 + "MGTPE".find(suffix.get(..1)?)? as u32;
            let base = if suffix.ends_with('i') { 1024 } else { 1000 };
            (power(base, exponent)?, 1)
        }
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let size = power(10, exponent.unsigned_abs().min(30))?;
            if exponent < 0 { (1, size) } else { (size, 1) }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::{millis, value};

    #[test]
    fn amounts_are_exact_and_round_up() {
        assert_eq!(millis("250m"), Some(250));
        assert_eq!(millis("1.5"), Some(1500));
        assert_eq!(millis("2"), Some(2000));
        assert_eq!(millis("1u"), Some(1));
        assert_eq!(value("64Mi"), Some(64 << 20));
        assert_eq!(value("1.5Gi"), Some(3 << 29));
        assert_eq!(value("100m"), Some(1));
        assert_eq!(value("1e3"), Some(1000));
        assert_eq!(value("5E"), Some(5_000_000_000_000_000_000));
        assert_eq!(value("1E2"), Some(100));
        for bad in [
            "",
            "x",
            "1..2",
            "-1",
            "1Kb",
            "1e",
            ".",
            "99999999999999999999",
            "1Mii",
        ] {
            assert_eq!(value(bad), None, "{bad}");
        }
    }
}
