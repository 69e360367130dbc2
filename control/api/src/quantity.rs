//! Resource quantities: `500m`, `1.5Gi`, `2e3`, exactly as Kubernetes reads and writes them.
//!
//! A quantity is a whole number of nanos in an i128: sums and comparisons are exact, nothing is a
//! float. Source of the rules: `apimachinery/pkg/api/resource/quantity.go`. As there, finer digits
//! than nanos round up, and magnitudes are capped at 2^63-1.

use std::fmt;

const NANOS: i128 = 1_000_000_000;
/// Kubernetes caps quantities at what fits into an int64 of whole units.
const MAX_NANOS: i128 = (i64::MAX as i128) * NANOS;

/// How a quantity was written, which decides how it is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// `12Mi`
    BinarySi,
    /// `12M`, `100m`
    DecimalSi,
    /// `12e6`
    DecimalExponent,
}

/// A parsed quantity. Equality and order go by value, not by how it was written.
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

/// Why a text is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not of the form sign, digits, suffix.
    #[error(
        "quantities must match the regular expression \
         '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
    )]
    Form,
    /// The number is fine, the suffix is not.
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

impl Quantity {
    /// Parses `text`.
    ///
    /// # Errors
    /// With Kubernetes' own texts.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let number_end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(number_end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.len() + fraction.len() == 0 || fraction.contains('.') {
            return Err(QuantityError::Form);
        }
        let (scale, format) = Scale::parse(suffix)?;
        let magnitude = scale.apply(whole, fraction);
        Ok(Self {
            nanos: if negative { -magnitude } else { magnitude },
            format,
        })
    }

    /// A quantity of whole units.
    #[must_use]
    pub fn from_units(units: i64) -> Self {
        Self {
            nanos: i128::from(units) * NANOS,
            format: Format::DecimalSi,
        }
    }

    /// A quantity of thousandths.
    #[must_use]
    pub fn from_milli(milli: i64) -> Self {
        Self {
            nanos: i128::from(milli) * (NANOS / 1000),
            format: Format::DecimalSi,
        }
    }

    /// A quantity of bytes, printed with binary suffixes.
    #[must_use]
    pub fn from_bytes(bytes: i64) -> Self {
        Self {
            nanos: i128::from(bytes) * NANOS,
            format: Format::BinarySi,
        }
    }

    /// Whole units, rounded up; saturates at i64.
    #[must_use]
    pub fn units(self) -> i64 {
        saturate(ceil_div(self.nanos, NANOS))
    }

    /// Thousandths, rounded up; saturates at i64. CPU limits are compared in these.
    #[must_use]
    pub fn milli(self) -> i64 {
        saturate(ceil_div(self.nanos, NANOS / 1000))
    }

    /// Whether the value is below zero.
    #[must_use]
    pub fn is_negative(self) -> bool {
        self.nanos < 0
    }

    /// Whether the value is a whole number of units.
    #[must_use]
    pub fn is_whole(self) -> bool {
        self.nanos % NANOS == 0
    }

    /// Whether the value is zero.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.nanos == 0
    }

    /// The value as a float, for ratios.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio needs no 64 digits")]
    pub fn as_f64(self) -> f64 {
        self.nanos as f64 / NANOS as f64
    }

    /// What is left of it without `other`, in the format of `self`; below zero where there is less.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        let nanos = (self.nanos - other.nanos).clamp(-MAX_NANOS, MAX_NANOS);
        Self {
            nanos,
            format: self.format,
        }
    }

    /// The sum, in the format of `self`; saturates.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let nanos = (self.nanos + other.nanos).clamp(-MAX_NANOS, MAX_NANOS);
        Self {
            nanos,
            format: self.format,
        }
    }
}

fn saturate(n: i128) -> i64 {
    i64::try_from(n).unwrap_or(if n < 0 { i64::MIN } else { i64::MAX })
}

/// Rounds away from zero, as Kubernetes rounds quantities.
fn ceil_div(n: i128, by: i128) -> i128 {
    let quotient = n / by;
    if n % by == 0 {
        quotient
    } else {
        quotient + n.signum()
    }
}

/// What a suffix multiplies by.
enum Scale {
    Binary { shift: u32 },
    Decimal { exponent: i32 },
}

impl Scale {
    fn parse(suffix: &str) -> Result<(Self, Format), QuantityError> {
        let binary = |shift| Ok((Self::Binary { shift }, Format::BinarySi));
        let decimal = |exponent| Ok((Self::Decimal { exponent }, Format::DecimalSi));
        match suffix {
            "Ki" => binary(10),
            "Mi" => binary(20),
            "Gi" => binary(30),
            "Ti" => binary(40),
            "Pi" => binary(50),
            "Ei" => binary(60),
            "n" => decimal(-9),
            "u" => decimal(-6),
            "m" => decimal(-3),
            "" => decimal(0),
            "k" => decimal(3),
            "M" => decimal(6),
            "G" => decimal(9),
            "T" => decimal(12),
            "P" => decimal(15),
            "E" => decimal(18),
            other => {
                let exponent = other
                    .strip_prefix(['e', 'E'])
                    .and_then(|e| e.parse::<i32>().ok())
                    .ok_or(QuantityError::Suffix)?;
                Ok((Self::Decimal { exponent }, Format::DecimalExponent))
            }
        }
    }

    /// `whole.fraction` times this scale in nanos, rounded up and capped.
    fn apply(&self, whole: &str, fraction: &str) -> i128 {
        let digits = || {
            whole
                .bytes()
                .chain(fraction.bytes())
                .map(|b| i128::from(b - b'0'))
        };
        // The value is digits * 10^exponent (* 2^shift), in nanos.
        let (shift, suffix_exponent) = match self {
            Self::Binary { shift } => (*shift, 0),
            Self::Decimal { exponent } => (0, i64::from(*exponent)),
        };
        let exponent = suffix_exponent - i64::try_from(fraction.len()).unwrap_or(i64::MAX) + 9;
        // Digits far below a nano matter only for rounding; a binary suffix can lift 19 of them.
        let floor = if shift == 0 { 0 } else { -19 };
        let count = i64::try_from(whole.len() + fraction.len()).unwrap_or(i64::MAX);
        let mut value: i128 = 0;
        let mut last_place = exponent.max(floor);
        let mut inexact = false;
        let mut full = false;
        for (position, digit) in (0_i64..).zip(digits()) {
            let place = count - 1 - position + exponent;
            let next = value.checked_mul(10).and_then(|v| v.checked_add(digit));
            match next {
                Some(next) if place >= floor && !full => {
                    value = next;
                    last_place = place;
                }
                None if place >= 0 => return MAX_NANOS,
                _ => {
                    full = true;
                    inexact |= digit != 0;
                }
            }
        }
        let exponent = last_place;
        if value == 0 {
            return i128::from(inexact);
        }
        if exponent >= 0 {
            for _ in 0..exponent {
                value = value.saturating_mul(10);
                if value > MAX_NANOS {
                    return MAX_NANOS;
                }
            }
            let nanos = value.checked_mul(1 << shift).unwrap_or(MAX_NANOS);
            return (nanos + i128::from(inexact)).min(MAX_NANOS);
        }
        let Some(value) = value.checked_mul(1 << shift) else {
            // Too large to shift first: then the digits below a nano are far below its precision.
            let divisor = 10_i128.pow(u32::try_from(-exponent).unwrap_or(0));
            return (value / divisor).saturating_mul(1 << shift).min(MAX_NANOS);
        };
        let divisor = 10_i128.pow(u32::try_from(-exponent).unwrap_or(0));
        let mut nanos = value / divisor;
        if value % divisor != 0 || inexact {
            nanos += 1;
        }
        nanos.min(MAX_NANOS)
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

/// The canonical form: no fraction, the largest suffix that loses nothing.
impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        if self.format == Format::BinarySi && self.nanos.abs() >= 1024 * NANOS {
            let mut units = ceil_div(self.nanos, NANOS);
            let mut step = 0;
            while step < 6 && units % 1024 == 0 {
                units /= 1024;
                step += 1;
            }
            return write!(
                f,
                "{units}{}",
                ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][step]
            );
        }
        let mut mantissa = self.nanos;
        let mut step = 0;
        while step < 9 && mantissa % 1000 == 0 {
            mantissa /= 1000;
            step += 1;
        }
        if self.format == Format::DecimalExponent {
            return match step as i32 * 3 - 9 {
                0 => write!(f, "{mantissa}"),
                exponent => write!(f, "{mantissa}e{exponent}"),
            };
        }
        write!(
            f,
            "{mantissa}{}",
            ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"][step]
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn canonical(text: &str) -> String {
        Quantity::parse(text).unwrap().to_string()
    }

    #[test]
    fn canonical_forms_are_kubernetes_own() {
        for (text, expected) in [
            ("0", "0"),
            ("1.5", "1500m"),
            ("1.5Gi", "1536Mi"),
            ("0.5", "500m"),
            ("500m", "500m"),
            ("1000m", "1"),
            ("1024", "1024"),
            ("1024Ki", "1Mi"),
            ("0.5Ki", "512"),
            ("1536", "1536"),
            ("1.5Ki", "1536"),
            ("100M", "100M"),
            ("1000M", "1G"),
            ("1e3", "1e3"),
            ("12e5", "1200e3"),
            ("1E", "1E"),
            ("1E3", "1e3"),
            ("-1", "-1"),
            ("+2", "2"),
            ("0.0000000001", "1n"),
            (".5", "500m"),
            ("1.", "1"),
            ("64Mi", "64Mi"),
            ("0000.1250Mi", "128Ki"),
            ("9223372036854775807", "9223372036854775807"),
            ("99999999999999999999E", "9223372036854775807"),
        ] {
            assert_eq!(canonical(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in [
            "", ".", "-", "1.2.3", "1x", "1 Gi", "Gi", "1KiB", "1ee3", "e3", "--1", "1e",
        ] {
            assert!(Quantity::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn rounding_is_away_from_zero() {
        assert_eq!(Quantity::parse("1n").unwrap().milli(), 1);
        assert_eq!(Quantity::parse("-1n").unwrap().units(), -1);
        assert_eq!(
            Quantity::parse("1.0000000001").unwrap().to_string(),
            "1000000001n"
        );
        assert_eq!(Quantity::parse("250m").unwrap().milli(), 250);
        assert_eq!(Quantity::parse("64Mi").unwrap().units(), 64 << 20);
    }

    proptest! {
        #[test]
        fn printing_and_parsing_keep_the_value(
            whole in 0u64..1_000_000_000, fraction in "[0-9]{0,9}",
            suffix in prop::sample::select(vec!["", "m", "u", "k", "M", "G", "Ki", "Mi", "e2", "e-3"]),
        ) {
            let text = format!("{whole}.{fraction}{suffix}");
            let first = Quantity::parse(&text).unwrap();
            let printed = first.to_string();
            let second = Quantity::parse(&printed).unwrap();
            // Binary forms print whole units, rounded up; what has no binary suffix then is read as
            // a decimal form, whose own form may be shorter.
            if matches!(suffix, "Ki" | "Mi") {
                prop_assert_eq!(second.units(), first.units());
            } else {
                prop_assert_eq!(second, first);
                prop_assert_eq!(second.to_string(), printed);
            }
        }

        #[test]
        fn nothing_panics(text in "\\PC{0,40}") {
            let _ = Quantity::parse(&text);
        }

        #[test]
        fn long_numbers_do_not_panic(text in "[+-]?[0-9]{0,60}\\.?[0-9]{0,60}(e-?[0-9]{1,9}|Ei|n)?") {
            let _ = Quantity::parse(&text).map(|q| q.to_string());
        }
    }
}
