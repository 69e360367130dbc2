//! `gantry-agent image`: what is here, and what is done to it, with progress bars.

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result};
use gantry_agent::images::inventory::{InventoryError, Wanted};
use gantry_agent::images::{ImageStore, Progress, PullPolicy, Registries};
use gantry_agent::paths::Paths;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// The operator's search list and mirrors.
pub const REGISTRIES: &str = "/etc/gantry/registries.yaml";

fn open(paths: &Paths) -> Result<ImageStore> {
    let registries =
        Registries::read(Path::new(REGISTRIES)).map_err(|words| anyhow::anyhow!("{words}"))?;
    Ok(ImageStore::open_with(&paths.lib, registries)?)
}

fn bar(name: String) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {wide_msg}")
        .context("progress bar")?;
    Ok(ProgressBar::new(0).with_style(style).with_message(name))
}

/// Imports every image of an archive and prints their names.
pub async fn import(paths: &Paths, archive: &Path) -> Result<()> {
    let images = open(paths)?;
    let name = archive
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let bar = bar(name)?;
    let progress = watched(&bar);
    let imported = images
        .import(archive, progress)
        .await
        .with_context(|| format!("import {}", archive.display()));
    bar.finish_and_clear();
    for image in imported? {
        for reference in image.references {
            println!("imported {reference}");
        }
    }
    Ok(())
}

/// Called from the threads that do the work.
fn watched(bar: &ProgressBar) -> impl Fn(Progress) + Send + Sync + 'static {
    let shown = Mutex::new(bar.clone());
    move |progress| {
        if let Ok(bar) = shown.lock() {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        }
    }
}

/// Asks the registry, whatever is here, and prints the image's name with its digest.
pub async fn pull(paths: &Paths, name: &str) -> Result<()> {
    // A second TLS provider cannot be there: this command installs the only one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let images = open(paths)?;
    let bar = bar(name.to_owned())?;
    let image = images
        .ensure_watched(name, PullPolicy::Always, &[], &watched(&bar))
        .await;
    bar.finish_and_clear();
    let image = image?;
    println!(
        "pulled {} ({})",
        image.image_id(),
        HumanBytes(image.size_bytes)
    );
    Ok(())
}

/// One line per name.
pub async fn list(paths: &Paths) -> Result<()> {
    for image in open(paths)?.list(&Wanted::new()).await? {
        let pinned = if image.pinned { "  pinned" } else { "" };
        let used = match image.users.len() {
            0 => String::new(),
            count => format!("  used by {count} pods"),
        };
        for name in &image.names {
            let size = HumanBytes(image.size_bytes);
            println!("{name}  {}  {size}{pinned}{used}", image.id);
        }
    }
    Ok(())
}

/// What the command for people adds to a refusal.
fn refused(error: InventoryError) -> anyhow::Error {
    let next = match &error {
        InventoryError::NotHere { .. } => ": gantry-agent image ls lists what is",
        InventoryError::InUse { .. } => " by pods: delete them first",
        InventoryError::Busy | InventoryError::Store(_) => "",
    };
    anyhow::anyhow!("{error}{next}")
}

/// Takes a name away, and with the last one the image.
pub async fn remove(paths: &Paths, name: &str) -> Result<()> {
    let removed = open(paths)?.remove(name, &Wanted::new()).await;
    let removed = removed.map_err(refused)?;
    for name in removed.names {
        println!("removed {name}");
    }
    if let Some(image) = removed.image {
        println!("removed {} ({})", image.id, HumanBytes(image.size_bytes));
    }
    Ok(())
}

/// Removes what nobody uses.
pub async fn prune(paths: &Paths) -> Result<()> {
    let gone = open(paths)?.prune(&Wanted::new()).await.map_err(refused)?;
    for image in &gone {
        println!("removed {}", image.id);
    }
    println!("{} images removed", gone.len());
    Ok(())
}

/// Pins an image, or no longer.
pub async fn pin(paths: &Paths, name: &str, pinned: bool) -> Result<()> {
    let image = open(paths)?
        .set_pinned(name, pinned)
        .await
        .map_err(refused)?;
    println!(
        "{} is {}",
        image.id,
        if image.pinned { "pinned" } else { "not pinned" }
    );
    Ok(())
}
