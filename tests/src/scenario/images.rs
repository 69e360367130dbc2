//! The images of a node, from the command line: listed, refused in words, removed, sent and used.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::sleeper;
use crate::cluster::{Cluster, NODE};

const BUSYBOX: &str = "gantry.local/busybox:debian";

/// Through the agent's own stream, as logs and exec.
pub(super) fn images(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&sleeper("user", ""))?;
    cluster.wait_ready("default", "user")?;
    let row = row(cluster)?;
    let cells: Vec<&str> = row.split_whitespace().collect();
    ensure!(
        cells.len() == 8 && cells[2] == "debian" && cells[6..] == ["yes", "default/user"],
        "{row}"
    );
    let digest = cells[3].to_owned();
    let refused = |arguments: &[&str], words: &[&str]| -> Result<()> {
        let output = cluster.gantry(arguments)?;
        let told = words.iter().all(|word| output.stderr.contains(word));
        ensure!(output.code == 1 && told, "{arguments:?}: {output:?}");
        Ok(())
    };
    refused(
        &["images", "rm", BUSYBOX],
        &[NODE, "in use by default/user"],
    )?;
    refused(
        &["images", "rm", "nobody:1"],
        &["no image is called", "nobody:1"],
    )?;
    refused(
        &["images", "pull", "127.0.0.1:9/none:1"],
        &["127.0.0.1:9/none:1"],
    )?;
    refused(
        &["images", "--node", "elsewhere"],
        &["nodes \"elsewhere\" not found"],
    )?;
    let archive = cluster.archive("busybox")?;
    let damaged = tempfile::tempdir()?;
    let damaged = damaged_copy(&archive, damaged.path())?;
    refused(&["images", "import", &damaged], &["damaged.tar"])?;

    // Nobody needs it any more: it goes at once, layers and all, and comes back the way it came.
    cluster.ok(&["delete", "pod", "user", "--now"])?;
    let told = RefCell::new(String::new());
    // The worker of the pod that has just gone may still have it in hand.
    cluster.wait("the image to be removed", Duration::from_secs(60), |c| {
        let output = c.gantry(&["images", "rm", BUSYBOX])?;
        *told.borrow_mut() = output.stdout;
        Ok(output.code == 0)
    })?;
    let removed = told.into_inner();
    ensure!(
        removed.contains(&format!("{NODE}: removed {BUSYBOX}")),
        "{removed}"
    );
    ensure!(layers()? == 0, "layers are left: {removed}");
    ensure!(cluster.ok(&["images", "--no-headers"])?.is_empty());
    let imported = cluster.ok(&["images", "import", &archive.to_string_lossy()])?;
    ensure!(imported.contains(BUSYBOX), "{imported}");
    let back = self::row(cluster)?;
    ensure!(back.contains(&digest), "{back}");
    cluster.apply_ok(&sleeper("again", ""))?;
    cluster.wait_ready("default", "again")?;
    cluster.ok(&["images", "pin", BUSYBOX, "--off"])?;
    let pruned = cluster.ok(&["images", "prune"])?;
    ensure!(pruned.contains("0 images removed"), "{pruned}");
    ensure!(self::row(cluster)?.contains(" no "), "still pinned");
    Ok(())
}

/// The line of the list with the busybox image. Its size is two words.
fn row(cluster: &Cluster) -> Result<String> {
    let list = cluster.ok(&["images"])?;
    let mut lines = list.lines();
    let header = lines.next().unwrap_or_default();
    ensure!(
        header.starts_with("NODE") && header.ends_with("USED-BY"),
        "{list}"
    );
    let row = lines.find(|line| line.contains("gantry.local/busybox"));
    Ok(row
        .with_context(|| format!("no busybox in {list}"))?
        .to_owned())
}

/// Half of an archive.
fn damaged_copy(archive: &Path, directory: &Path) -> Result<String> {
    let bytes = std::fs::read(archive)?;
    let path = directory.join("damaged.tar");
    std::fs::write(&path, &bytes[..bytes.len() / 2])?;
    Ok(path.to_string_lossy().into_owned())
}

fn layers() -> Result<usize> {
    let directory = PathBuf::from("/var/lib/gantry/images/layers");
    let entries = std::fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    Ok(entries.count())
}
