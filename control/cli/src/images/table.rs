//! How `gantry images` shows images. Pure.

use std::collections::BTreeMap;

use gantry_api::proto::{ImagesDone, NodeImage};

use super::size;

const NONE: &str = "<none>";
/// Hexadecimal digits of a digest: enough to name an image by.
const DIGITS: usize = 12;

/// The names of an image in one repository.
#[derive(Default)]
struct Repository<'a> {
    tags: Vec<&'a str>,
    digests: Vec<&'a str>,
}

pub(super) fn header(is_wide: bool) -> Vec<String> {
    let mut names = vec![
        "NODE", "IMAGE", "TAG", "DIGEST", "SIZE", "PINNED", "USED-BY",
    ];
    if is_wide {
        names.push("ID");
    }
    names.into_iter().map(str::to_owned).collect()
}

/// A row per node and tag; an image without a name has one too.
pub(super) fn rows(done: &[(&str, ImagesDone)], is_wide: bool) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for (node, done) in done {
        for image in &done.images {
            for (name, tag, digest) in names(image) {
                let digest = match is_wide {
                    true => digest.to_owned(),
                    false => short(digest).to_owned(),
                };
                let pinned = if image.pinned { "yes" } else { "no" };
                let users = match image.users.as_slice() {
                    [] => NONE.to_owned(),
                    users => users.join(","),
                };
                let mut row = vec![(*node).to_owned(), name.to_owned(), tag.to_owned(), digest];
                row.extend([size(image.size_bytes), pinned.to_owned(), users]);
                if is_wide {
                    row.push(image.id.clone());
                }
                rows.push(row);
            }
        }
    }
    rows.sort();
    rows
}

/// Name, tag and digest, as often as there are tags in a repository.
fn names(image: &NodeImage) -> Vec<(&str, &str, &str)> {
    let mut repositories: BTreeMap<&str, Repository<'_>> = BTreeMap::new();
    for name in &image.names {
        let slash = name.rfind('/').map_or(0, |at| at + 1);
        let colon = name[slash..].rfind(':').map(|at| slash + at);
        match (name.split_once('@'), colon) {
            (Some((repository, digest)), _) => {
                repositories
                    .entry(repository)
                    .or_default()
                    .digests
                    .push(digest);
            }
            (None, Some(at)) => {
                let tags = &mut repositories.entry(&name[..at]).or_default().tags;
                tags.push(&name[at + 1..]);
            }
            (None, None) => {
                repositories.entry(name).or_default();
            }
        }
    }
    let mut all = Vec::new();
    for (name, Repository { tags, digests }) in repositories {
        let digest = digests.first().copied().unwrap_or(NONE);
        match tags.is_empty() {
            true => all.push((name, NONE, digest)),
            false => all.extend(tags.into_iter().map(|tag| (name, tag, digest))),
        }
    }
    if all.is_empty() {
        all.push((NONE, NONE, NONE));
    }
    all
}

fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..DIGITS).unwrap_or(hex)
}

/// What was done on a node: names that went, and images.
pub(super) fn lines(node: &str, verb: &str, done: &ImagesDone) -> String {
    let mut text = String::new();
    for name in &done.names {
        text.push_str(&format!("{node}: {verb} {name}\n"));
    }
    for image in &done.images {
        // By the name that people use, where the names are not told already.
        let name = image.names.iter().find(|name| !name.contains('@'));
        let name = match (done.names.is_empty(), name) {
            (true, Some(name)) => format!("{name} "),
            _ => String::new(),
        };
        let (id, size) = (short(&image.id), size(image.size_bytes));
        text.push_str(&format!("{node}: {verb} {name}(image {id}, {size})\n"));
    }
    text
}

pub(super) fn pruned(node: &str, done: &ImagesDone) -> String {
    let bytes = done.images.iter().map(|image| image.size_bytes).sum();
    let (count, size) = (done.images.len(), size(bytes));
    format!("{node}: {count} images removed ({size})\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(names: &[&str]) -> NodeImage {
        NodeImage {
            id: "sha256:0123456789abcdef".into(),
            names: names.iter().map(|&name| name.into()).collect(),
            size_bytes: 2048,
            pinned: true,
            users: vec!["shop/web".into(), "shop/db".into()],
        }
    }

    #[test]
    fn every_tag_is_a_row_with_its_repository_s_digest() {
        let image = image(&[
            "host:5000/a:1",
            "host:5000/a:2",
            "host:5000/a@sha256:fedcba9876543210",
            "docker.io/library/b:1",
            "docker.io/library/c@sha256:00",
        ]);
        let done = [(
            "n",
            ImagesDone {
                images: vec![image, NodeImage::default()],
                names: Vec::new(),
            },
        )];
        let rows = rows(&done, false);
        let cells: Vec<String> = rows.iter().map(|row| row[1..4].join(" ")).collect();
        assert_eq!(
            cells,
            [
                "<none> <none> <none>",
                "docker.io/library/b 1 <none>",
                "docker.io/library/c <none> 00",
                "host:5000/a 1 fedcba987654",
                "host:5000/a 2 fedcba987654",
            ]
        );
        assert_eq!(rows[3][4..], ["2.00 KiB", "yes", "shop/web,shop/db"]);
        assert_eq!(rows[3].len(), header(false).len());
        assert_eq!(super::rows(&done, true)[3].len(), header(true).len());
    }

    #[test]
    fn lines_tell_what_came_and_what_went() {
        let mut done = ImagesDone {
            images: vec![image(&["a@sha256:0", "a:1"])],
            names: Vec::new(),
        };
        assert_eq!(
            lines("n", "pulled", &done),
            "n: pulled a:1 (image 0123456789ab, 2.00 KiB)\n"
        );
        done.names = vec!["a:1".into()];
        assert_eq!(
            lines("n", "removed", &done),
            "n: removed a:1\nn: removed (image 0123456789ab, 2.00 KiB)\n"
        );
        assert_eq!(pruned("n", &done), "n: 1 images removed (2.00 KiB)\n");
    }
}
