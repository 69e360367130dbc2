//! `gantry-agent image`: import with a progress bar, list.

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result};
use gantry_agent::images::ImageStore;
use gantry_agent::paths::Paths;
use indicatif::{ProgressBar, ProgressStyle};

/// Imports every image of an archive and prints their names.
pub async fn import(paths: &Paths, archive: &Path) -> Result<()> {
    let images = ImageStore::open(&paths.lib)?;
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {wide_msg}")
        .context("progress bar")?;
    let name = archive
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let bar = ProgressBar::new(0).with_style(style).with_message(name);
    // The callback is called from the unpacking thread.
    let shown = Mutex::new(bar.clone());
    let imported = images
        .import(archive, move |progress| {
            if let Ok(bar) = shown.lock() {
                bar.set_length(progress.total_bytes);
                bar.set_position(progress.done_bytes);
            }
        })
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

/// One line per name.
pub async fn list(paths: &Paths) -> Result<()> {
    let images = ImageStore::open(&paths.lib)?.list().await?;
    for image in images {
        for reference in &image.references {
            println!("{reference}  {}", image.id);
        }
    }
    Ok(())
}
