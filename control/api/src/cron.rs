//! Cron schedules: the five fields of a CronJob, and the next moment that they name.
//!
//! ```text
//!  minute hour day-of-month month day-of-week      * , - / names (JAN, MON) ? and @hourly … @yearly
//! ```
//! Pure. When both days are restricted either is enough, as in Vixie cron. A local time that a change
//! of the clocks skips does not happen; one that happens twice counts the first time.
//!
//! Source: `man 5 crontab`, robfig/cron v3 (Kubernetes' parser).

use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;

/// Days that are looked at: a leap day is at most eight years away.
const DAY_COUNT_MAX: i64 = 366 * 8 + 2;

/// A parsed schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Neither of both days was `*`.
    either_day: bool,
}

const MONTHS: [&str; 12] = [
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

struct Field {
    what: &'static str,
    min: u32,
    max: u32,
    /// Names and the number of the first.
    names: &'static [&'static str],
}

const FIELDS: [Field; 5] = [
    Field {
        what: "minute",
        min: 0,
        max: 59,
        names: &[],
    },
    Field {
        what: "hour",
        min: 0,
        max: 23,
        names: &[],
    },
    Field {
        what: "day of month",
        min: 1,
        max: 31,
        names: &[],
    },
    Field {
        what: "month",
        min: 1,
        max: 12,
        names: &MONTHS,
    },
    Field {
        what: "day of week",
        min: 0,
        max: 7,
        names: &WEEKDAYS,
    },
];

impl Field {
    fn number(&self, text: &str) -> Result<u32, String> {
        let lower = text.to_ascii_lowercase();
        if let Some(index) = self.names.iter().position(|name| *name == lower) {
            return Ok(self.min + u32::try_from(index).unwrap_or(0));
        }
        let number = text
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse().ok());
        number
            .flatten()
            .ok_or_else(|| format!("{}: {text:?} is no number", self.what))
    }

    /// The bits that one field names, and whether it is a star.
    fn parse(&self, text: &str) -> Result<(u64, bool), String> {
        let (mut bits, mut is_star) = (0_u64, false);
        for part in text.split(',') {
            let (range, step) = match part.split_once('/') {
                Some((range, step)) => (range, Some(self.number(step)?)),
                None => (part, None),
            };
            let (first, last) = match range.split_once('-') {
                _ if matches!(range, "*" | "?") => {
                    is_star |= step.is_none_or(|step| step == 1);
                    (self.min, self.max)
                }
                Some((first, last)) => (self.number(first)?, self.number(last)?),
                // "5/10" means from 5 to the end.
                None if step.is_some() => (self.number(range)?, self.max),
                None => (self.number(range)?, self.number(range)?),
            };
            if first < self.min || last > self.max || first > last {
                let (min, max) = (self.min, self.max);
                return Err(format!("{}: {part:?} is not within {min}-{max}", self.what));
            }
            let step = step.unwrap_or(1);
            if step == 0 {
                return Err(format!("{}: {part:?} has a step of 0", self.what));
            }
            let mut at = first;
            while at <= last {
                bits |= 1 << at;
                at += step;
            }
        }
        Ok((bits, is_star))
    }
}

impl Schedule {
    /// Reads `*/5 * * * *`, `@daily` and the like.
    ///
    /// # Errors
    /// What is wrong, in a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let text = match text {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" | "@midnight" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            other => other,
        };
        if text.contains("TZ=") {
            return Err("use spec.timeZone instead of TZ or CRON_TZ".to_owned());
        }
        let parts: Vec<&str> = text.split_whitespace().collect();
        if parts.len() != FIELDS.len() {
            return Err(format!(
                "expected exactly 5 fields, found {}: {text:?}",
                parts.len()
            ));
        }
        let mut fields = [(0_u64, false); 5];
        for ((slot, field), part) in fields.iter_mut().zip(&FIELDS).zip(parts) {
            *slot = field.parse(part)?;
        }
        let [minutes, hours, days, months, mut weekdays] = fields;
        // Sunday is 0 and 7.
        if weekdays.0 & (1 << 7) != 0 {
            weekdays.0 |= 1;
        }
        Ok(Self {
            minutes: minutes.0,
            hours: hours.0,
            days: days.0,
            months: months.0,
            weekdays: weekdays.0,
            either_day: !days.1 && !weekdays.1,
        })
    }

    fn has_date(&self, date: Date) -> bool {
        let bit = |bits: u64, at: i8| bits & (1 << at) != 0;
        let day = bit(self.days, date.day());
        let weekday = bit(self.weekdays, date.weekday().to_sunday_zero_offset());
        let days = if self.either_day {
            day || weekday
        } else {
            day && weekday
        };
        bit(self.months, date.month()) && days
    }

    /// The first moment after `after` in this zone; `None` for a date that never comes.
    #[must_use]
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let start = after.to_zoned(zone.clone()).datetime();
        let mut date = start.date();
        for _ in 0..DAY_COUNT_MAX {
            if self.has_date(date) {
                let from_hour = if date == start.date() {
                    start.hour()
                } else {
                    0
                };
                let hours = (from_hour..24).filter(|hour| self.hours & (1 << hour) != 0);
                for hour in hours {
                    let minutes = (0..60_i8).filter(|minute| self.minutes & (1 << minute) != 0);
                    let found = minutes
                        .filter_map(|minute| moment(date.at(hour, minute, 0, 0), zone))
                        .find(|found| *found > after);
                    if found.is_some() {
                        return found;
                    }
                }
            }
            date = date.tomorrow().ok()?;
        }
        None
    }
}

/// A local time as a moment; `None` when the clocks skip it.
fn moment(local: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    let ambiguous = zone.to_ambiguous_timestamp(local);
    if matches!(ambiguous.offset(), jiff::tz::AmbiguousOffset::Gap { .. }) {
        return None;
    }
    ambiguous.earlier().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn next(schedule: &str, after: &str, zone: &str) -> String {
        let zone = TimeZone::get(zone).unwrap();
        let schedule = Schedule::parse(schedule).unwrap();
        let found = schedule.next(after.parse().unwrap(), &zone);
        found.map_or_else(|| "never".to_owned(), |found| found.to_string())
    }

    #[test]
    fn schedules_name_the_moments_that_crontab_says() {
        for (schedule, after, expected) in [
            (
                "*/5 * * * *",
                "2026-01-01T00:00:00Z",
                "2026-01-01T00:05:00Z",
            ),
            (
                "*/5 * * * *",
                "2026-01-01T00:04:59Z",
                "2026-01-01T00:05:00Z",
            ),
            ("@hourly", "2026-12-31T23:10:00Z", "2027-01-01T00:00:00Z"),
            (
                "0 2 * * MON-FRI",
                "2026-01-02T02:00:00Z",
                "2026-01-05T02:00:00Z",
            ),
            (
                "30 4 1,15 * 5",
                "2026-01-02T05:00:00Z",
                "2026-01-09T04:30:00Z",
            ),
            (
                "0 0 29 feb *",
                "2026-01-01T00:00:00Z",
                "2028-02-29T00:00:00Z",
            ),
            ("0 0 30 2 *", "2026-01-01T00:00:00Z", "never"),
            ("0 0 * * 7", "2026-01-01T00:00:00Z", "2026-01-04T00:00:00Z"),
            (
                "10/20 * * * ?",
                "2026-01-01T00:11:00Z",
                "2026-01-01T00:30:00Z",
            ),
        ] {
            assert_eq!(next(schedule, after, "UTC"), expected, "{schedule}");
        }
    }

    #[test]
    fn the_clocks_change() {
        // 02:30 does not exist on that day; 02:30 exists twice in autumn and counts once.
        let zone = "Europe/Berlin";
        assert_eq!(
            next("30 2 * * *", "2026-03-28T12:00:00Z", zone),
            "2026-03-30T00:30:00Z"
        );
        assert_eq!(
            next("30 2 * * *", "2026-10-24T12:00:00Z", zone),
            "2026-10-25T00:30:00Z"
        );
        assert_eq!(
            next("30 2 * * *", "2026-10-25T00:30:00Z", zone),
            "2026-10-26T01:30:00Z"
        );
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_the_field() {
        for (text, word) in [
            ("* * * *", "5 fields"),
            ("60 * * * *", "minute"),
            ("* * 0 * *", "day of month"),
            ("5-1 * * * *", "minute"),
            ("*/0 * * * *", "step"),
            ("* x * * *", "hour"),
            ("TZ=UTC * * * * *", "timeZone"),
        ] {
            let error = Schedule::parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    proptest! {
        /// The next moment is later, matches, and no matching minute lies between.
        #[test]
        fn nothing_between_is_skipped(
            minute in 0_u32..60, step in 1_u32..30, hour in 0_u32..24, second in 0_i64..200_000_000,
        ) {
            let schedule = Schedule::parse(&format!("{minute}/{step} {hour} * * *")).unwrap();
            let after = Timestamp::from_second(1_700_000_000 + second).unwrap();
            let found = schedule.next(after, &TimeZone::UTC).unwrap();
            prop_assert!(found > after);
            let matches = |at: Timestamp| {
                let at = at.to_zoned(TimeZone::UTC);
                at.second() == 0
                    && schedule.minutes & (1 << at.minute()) != 0
                    && schedule.hours & (1 << at.hour()) != 0
            };
            prop_assert!(matches(found));
            let first_minute = (after.as_second() / 60 + 1) * 60;
            let mut at = first_minute;
            while at < found.as_second() {
                prop_assert!(!matches(Timestamp::from_second(at).unwrap()));
                at += 60;
            }
        }

        #[test]
        fn garbage_makes_no_panic(text in ".{0,60}") {
            let _ = Schedule::parse(&text);
        }
    }
}
