//! The figures as tables for a terminal of 100 columns: pure.

use super::figures::{Figures, Measure};

/// Of the first column; each size takes 14 more.
const LABEL: usize = 26;

/// All tables, then what was not measured.
pub(super) fn tables(figures: &Figures) -> String {
    let mut text = String::new();
    for measure in Measure::ALL {
        text += &table(figures, measure);
    }
    text += &balance(figures);
    let singles: Vec<String> = figures
        .singles
        .iter()
        .map(|(name, unit, value, _)| format!("    {name:<60} {:>8} {unit}\n", short(*value)))
        .collect();
    if !singles.is_empty() {
        text += &format!("once\n{}\n", singles.concat());
    }
    for reason in &figures.skipped {
        text += &format!("skipped: {reason}\n");
    }
    text
}

fn table(figures: &Figures, measure: Measure) -> String {
    let cases = figures.cases(measure);
    if cases.is_empty() {
        return String::new();
    }
    let by = if measure.is_of_traffic() {
        "direct"
    } else {
        "Gantry"
    };
    let mut text = format!(
        "{}, {} and as a ratio to {by}\n",
        measure.title(),
        measure.unit()
    );
    let mut header = format!("    {:<LABEL$}", "services");
    for size in &figures.sizes {
        header += &format!("{:>8}{:>6}", size.label(), "");
    }
    text += header.trim_end();
    text.push('\n');
    for case in cases {
        let mut row = format!("    {:<LABEL$}", case.label());
        for size in &figures.sizes {
            let value = figures.value(measure, case, *size);
            let ratio = figures.ratio(measure, case, *size);
            let value = value.map_or_else(|| "-".into(), short);
            let ratio = ratio.map_or_else(String::new, ratio_text);
            row += &format!("{value:>8}{ratio:>6}");
        }
        text += row.trim_end();
        text.push('\n');
    }
    text.push('\n');
    text
}

fn balance(figures: &Figures) -> String {
    let reached: Vec<_> = figures.balance.iter().collect();
    if reached.is_empty() {
        return String::new();
    }
    let all: usize = reached.iter().map(|balance| balance.connections).sum();
    let layouts = reached.len();
    format!(
        "every endpoint was reached and none preferred (chi square): {layouts} times, {all} connections\n\n"
    )
}

/// Three digits that matter, never an exponent.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "-".into(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Two digits after the point while they matter.
pub(super) fn ratio_text(ratio: f64) -> String {
    match ratio.abs() {
        _ if !ratio.is_finite() => String::new(),
        size if size >= 100.0 => format!("{ratio:.0}"),
        size if size >= 10.0 => format!("{ratio:.1}"),
        _ => format!("{ratio:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::Case;
    use super::super::model::Size;
    use super::*;

    #[test]
    fn a_table_has_a_row_for_each_case_and_fits() {
        let big = Size {
            services: 1,
            endpoints: 1000,
        };
        let sizes = [1, 100, 1000, 10_000]
            .map(Size::of)
            .into_iter()
            .chain([big]);
        let mut figures = Figures {
            sizes: sizes.collect(),
            ..Figures::default()
        };
        for size in figures.sizes.clone() {
            figures.add(Measure::Crr, Case::Direct, size, 18_922.0);
            figures.add(Measure::Crr, Case::IptablesLegacyNodePort, size, 7_972.4);
        }
        figures.skipped.push("ipvs: no".into());
        let wanted = "\
connect, request, response, close, per s and as a ratio to direct
    services                         1           100          1000         10000        1x1000
    direct (plain bridge)        18922  1.00   18922  1.00   18922  1.00   18922  1.00   18922  1.00
    iptables-legacy, n. port      7972  0.42    7972  0.42    7972  0.42    7972  0.42    7972  0.42

skipped: ipvs: no
";
        let text = tables(&figures);
        assert_eq!(text, wanted);
        assert!(text.lines().all(|line| line.chars().count() <= 100));
    }

    #[test]
    fn numbers_have_the_digits_that_matter() {
        let shown = [0.0, 0.034, 9.876, 31.25, 18_922.4, f64::NAN].map(short);
        assert_eq!(shown, ["0.00", "0.03", "9.88", "31.2", "18922", "-"]);
        assert_eq!(
            [1.0167, 12.34, 3400.0].map(ratio_text),
            ["1.02", "12.3", "3400"]
        );
    }
}
