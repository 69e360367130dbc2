//! The report: one HTML document with everything in it, to be read in a browser or sent to somebody.
//! Pure; nothing is fetched, light and dark as the reader has it.

use std::fmt::Write;

use super::super::report::{Bound, Target};
use super::figures::{Case, Figures, Measure};
use super::svg::{self, Line, Plot, escape};
use super::text::{ratio_text, short};

const STYLE: &str = "\
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--faint:#59636e;--line:#d8dee4;--row:#f6f8fa;\
--good:#1a7f37;--bad:#cf222e}\
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--faint:#9198a1;--line:#30363d;\
--row:#151b23;--good:#56d364;--bad:#ff7b72}}\
body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:0 auto;\
max-width:64rem;padding:2rem 1rem}\
h1{margin-bottom:0}h2{border-bottom:1px solid var(--line);margin-top:2.5rem;padding-bottom:.3rem}\
p.faint,td.faint,.how{color:var(--faint)}.how{font-size:.9em}\
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}\
th,td{padding:.2rem .7rem;text-align:left;border-bottom:1px solid var(--line)}\
th{font-weight:600}td.number,th.number{text-align:right;white-space:nowrap}\
td.ratio{color:var(--faint);padding-left:0}tr.own td:first-child{font-weight:600}\
.met{color:var(--good)}.missed{color:var(--bad);font-weight:600}\
svg.plot{display:block;width:100%;height:auto;margin:.6rem 0}";

/// The document.
pub(super) fn document(figures: &Figures) -> String {
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>Gantry: Services beside kube-proxy's rules</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>Services</h1>\n<p class=\"faint\">Gantry beside kube-proxy's iptables and nftables rules and beside no rules at \
         all, in one run on one machine: what is compared takes turns in short bursts. A figure is the \
         median over rounds, a ratio the median of each round's ratio.</p>\n"
    );
    targets(&mut html, &figures.targets);
    for measure in Measure::ALL {
        section(&mut html, figures, measure);
    }
    balance(&mut html, figures);
    singles(&mut html, figures);
    html += "<h2>Who is measured</h2>\n<table>\n";
    for case in cases(figures) {
        row(&mut html, "", &[case.label(), case.what()]);
    }
    html += "</table>\n<h2>Where</h2>\n<table>\n";
    for (name, value) in &figures.facts {
        row(&mut html, "", &[name, value]);
    }
    html += "</table>\n";
    if !figures.skipped.is_empty() {
        html += "<h2>Not measured</h2>\n<ul>\n";
        for reason in &figures.skipped {
            put(&mut html, format_args!("<li>{}</li>\n", escape(reason)));
        }
        html += "</ul>\n";
    }
    html += "</body>\n</html>\n";
    html
}

/// The plots by file name, without its end.
pub(super) fn plots(figures: &Figures) -> Vec<(&'static str, String)> {
    let measures = Measure::ALL.into_iter();
    let drawn = measures.filter_map(|measure| {
        let plot = plot(figures, measure)?;
        Some((measure.key(), svg::draw(&plot)))
    });
    drawn.collect()
}

fn cases(figures: &Figures) -> Vec<Case> {
    let all = Measure::ALL.map(|measure| figures.cases(measure)).concat();
    let has = |case: &Case| all.contains(case);
    Case::ALL.into_iter().filter(has).collect()
}

fn plot(figures: &Figures, measure: Measure) -> Option<Plot> {
    let values = |case: Case| -> Vec<Option<f64>> {
        let sizes = figures.sizes.iter();
        sizes
            .map(|size| figures.value(measure, case, *size))
            .collect()
    };
    // The second floor is in the table; drawn, it would hide the first.
    let shown = figures.cases(measure).into_iter();
    let lines: Vec<Line> = shown
        .filter(|case| *case != Case::DirectAgain)
        .map(|case| Line {
            name: case.label().into(),
            class: colour(case),
            is_dashed: case.is_outside(),
            values: values(case),
        })
        .collect();
    (!lines.is_empty()).then(|| Plot {
        title: measure.title().into(),
        unit: measure.unit().into(),
        categories: figures.sizes.iter().map(|size| size.label()).collect(),
        is_logarithmic: !measure.is_of_traffic(),
        lines,
    })
}

/// A class of the plots' style.
fn colour(case: Case) -> &'static str {
    match case {
        Case::Pair | Case::Direct | Case::DirectAgain | Case::Routed => "floor",
        Case::Gantry | Case::GantrySocket => "gantry",
        Case::GantryPacket => "packet",
        Case::GantryNodePort => "port",
        Case::GantryPod => "pod",
        Case::IptablesNft | Case::IptablesNftNodePort => "iptables",
        Case::IptablesLegacy | Case::IptablesLegacyNodePort => "legacy",
        Case::Nftables | Case::NftablesNodePort => "nft",
    }
}

fn section(html: &mut String, figures: &Figures, measure: Measure) {
    let Some(plot) = plot(figures, measure) else {
        return;
    };
    let better = if measure.is_rate() { "more" } else { "less" };
    let by = if measure.is_of_traffic() {
        "direct"
    } else {
        "Gantry"
    };
    put(
        html,
        format_args!(
            "<h2 id=\"{}\">{}</h2>\n<p class=\"how\">{} {} is better; in grey, the ratio to {by}.</p>\n{}",
            measure.key(),
            escape(measure.title()),
            escape(measure.how()),
            capital(better),
            svg::draw(&plot)
        ),
    );
    put(
        html,
        format_args!(
            "<div class=\"wide\"><table>\n<tr><th>{}</th>",
            escape(measure.unit())
        ),
    );
    for size in &figures.sizes {
        put(
            html,
            format_args!("<th class=\"number\">{}</th><th></th>", size.label()),
        );
    }
    html.push_str("</tr>\n");
    for case in figures.cases(measure) {
        let own = if case.label().starts_with("Gantry") {
            " class=\"own\""
        } else {
            ""
        };
        put(
            html,
            format_args!("<tr{own}><td>{}</td>", escape(case.label())),
        );
        for size in &figures.sizes {
            let value = figures.value(measure, case, *size);
            let ratio = figures.ratio(measure, case, *size);
            put(
                html,
                format_args!(
                    "<td class=\"number\">{}</td><td class=\"number ratio\">{}</td>",
                    value.map_or_else(|| "-".into(), short),
                    ratio.map_or_else(String::new, ratio_text)
                ),
            );
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
}

fn targets(html: &mut String, targets: &[Target]) {
    if targets.is_empty() {
        return;
    }
    let met = targets.iter().filter(|target| target.is_met()).count();
    put(
        html,
        format_args!(
            "<h2>Targets: {met} of {} met</h2>\n<div class=\"wide\"><table>\n<tr><th>what</th><th \
             class=\"number\">limit</th><th class=\"number\">got</th><th></th></tr>\n",
            targets.len()
        ),
    );
    for target in targets {
        let sign = match target.bound {
            Bound::Max => "≤",
            Bound::Min => "≥",
        };
        let (class, word) = match target.is_met() {
            true => ("met", "met"),
            false => ("missed", "missed"),
        };
        put(
            html,
            format_args!(
                "<tr><td>{}</td><td class=\"number\">{sign} {}</td><td class=\"number\">{}</td><td \
                 class=\"{class}\">{word}</td></tr>\n",
                escape(&target.what),
                target.limit,
                shown(target.got)
            ),
        );
    }
    html.push_str("</table></div>\n");
}

/// Beside a limit of two digits after the point three are of use.
fn shown(got: f64) -> String {
    match got.abs() {
        _ if !got.is_finite() => "not measured".into(),
        size if size < 10.0 => format!("{got:.3}"),
        _ => short(got),
    }
}

fn balance(html: &mut String, figures: &Figures) {
    if figures.balance.is_empty() {
        return;
    }
    html.push_str(
        "<h2>Does it balance?</h2>\n<p class=\"how\">Before anything is timed, each layout must reach every \
         endpoint, and prefer none (chi square; an even choice exceeds the limit once in three million \
         times). Else there are no figures.</p>\n<div class=\"wide\"><table>\n<tr><th>services</th><th></th><th \
         class=\"number\">endpoints reached</th><th class=\"number\">connections</th><th class=\"number\">chi \
         square</th><th class=\"number\">limit</th></tr>\n",
    );
    for of in &figures.balance {
        put(
            html,
            format_args!(
                "<tr><td>{}</td><td>{}</td><td class=\"number\">{} of {}</td><td class=\"number\">{}</td><td \
                 class=\"number\">{}</td><td class=\"number\">{}</td></tr>\n",
                of.size.label(),
                escape(of.case.label()),
                of.reached,
                of.endpoints,
                of.connections,
                short(of.chi_square),
                short(of.chi_square_max)
            ),
        );
    }
    html.push_str("</table></div>\n");
}

fn singles(html: &mut String, figures: &Figures) {
    if figures.singles.is_empty() {
        return;
    }
    html.push_str("<h2>By themselves</h2>\n<table>\n");
    for (name, unit, value, how) in &figures.singles {
        put(
            html,
            format_args!(
                "<tr><td>{}</td><td class=\"number\">{} {unit}</td><td class=\"faint\">{}</td></tr>\n",
                escape(name),
                short(*value),
                escape(how)
            ),
        );
    }
    html.push_str("</table>\n");
}

fn row(html: &mut String, class: &str, cells: &[&str]) {
    put(html, format_args!("<tr{class}>"));
    for cell in cells {
        put(html, format_args!("<td>{}</td>", escape(cell)));
    }
    html.push_str("</tr>\n");
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    let first = letters
        .next()
        .map(|letter| letter.to_uppercase().to_string());
    first.unwrap_or_default() + letters.as_str()
}

fn put(text: &mut String, part: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = text.write_fmt(part);
}

#[cfg(test)]
mod tests {
    use super::super::figures::Balance;
    use super::super::model::Size;
    use super::*;

    fn figures() -> Figures {
        let (one, many) = (Size::of(1), Size::of(10_000));
        let mut figures = Figures {
            sizes: vec![one, many],
            facts: vec![("kernel", "6.18 <x>".into())],
            skipped: vec!["ipvs: no".into()],
            ..Figures::default()
        };
        for size in [one, many] {
            figures.add(Measure::ConnectP50, Case::Direct, size, 31.4);
            figures.add(Measure::ConnectP50, Case::DirectAgain, size, 31.5);
            figures.add(Measure::ConnectP50, Case::GantrySocket, size, 31.6);
            figures.add(Measure::Load, Case::Gantry, size, 7.0);
        }
        figures
            .balance
            .push(Balance::of(one, Case::GantrySocket, &[100.0; 3]));
        figures.judge();
        figures
    }

    #[test]
    fn the_report_has_each_measure_once_with_its_plot_table_and_method() {
        let html = document(&figures());
        for (text, count) in [
            ("<svg ", 2),
            ("</svg>", 2),
            ("<h2 id=\"connect_p50\">", 1),
            ("<h2 id=\"load\">", 1),
            (
                "<td class=\"number\">31.6</td><td class=\"number ratio\">1.01</td>",
                2,
            ),
            ("<td class=\"number\">3 of 3</td>", 1),
            ("6.18 &lt;x&gt;", 1),
            ("<li>ipvs: no</li>", 1),
            ("prefers-color-scheme:dark", 3),
        ] {
            assert_eq!(html.matches(text).count(), count, "{text}");
        }
        let opened = html.matches("<table>").count();
        assert_eq!(html.matches("</table>").count(), opened);
        assert!(html.contains("Targets: 3 of 3 met"));
    }

    #[test]
    fn the_report_fetches_nothing() {
        let html = document(&figures()).replace("http://www.w3.org/2000/svg", "");
        for word in ["http", "url(", "src=", "<script", "<link", "@import"] {
            assert!(!html.contains(word), "{word}");
        }
    }

    #[test]
    fn there_is_a_plot_for_each_measure_without_the_second_floor() {
        let plots = plots(&figures());
        let names: Vec<&str> = plots.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["connect_p50", "load"]);
        assert_eq!(plots[0].1.matches("<polyline").count(), 2);
        assert!(!plots[0].1.contains("noise"));
    }
}
