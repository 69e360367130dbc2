//! What a container executes: entrypoint and arguments, `$(VAR)`, working directory.

use std::path::PathBuf;

use gantry_api::k8s_openapi::api::core::v1::Container;
use oci_spec::image::ImageConfiguration;

use super::SpecError;

/// argv. Kubernetes' rules: `command` replaces the image's entrypoint *and* command, `args`
/// replaces the image's command.
pub(super) fn line(
    container: &Container,
    image: &ImageConfiguration,
    env: &[(String, String)],
) -> Result<Vec<String>, SpecError> {
    let expanded = |words: &[String]| -> Vec<String> {
        words
            .iter()
            .map(|word| expand(word, |name| lookup(env, name)))
            .collect()
    };
    let given = |words: &Option<Vec<String>>| words.clone().filter(|w| !w.is_empty());
    let config = image.config().as_ref();
    let entrypoint = config
        .and_then(|c| c.entrypoint().clone())
        .unwrap_or_default();
    let default_args = config.and_then(|c| c.cmd().clone()).unwrap_or_default();
    let words = match (given(&container.command), given(&container.args)) {
        (Some(command), args) => {
            let mut words = expanded(&command);
            words.extend(expanded(&args.unwrap_or_default()));
            words
        }
        (None, Some(args)) => {
            let mut words = entrypoint;
            words.extend(expanded(&args));
            words
        }
        (None, None) => {
            let mut words = entrypoint;
            words.extend(default_args);
            words
        }
    };
    if words.is_empty() {
        return Err(SpecError::Refused("no command specified".into()));
    }
    Ok(words)
}

fn lookup<'a>(env: &'a [(String, String)], name: &str) -> Option<&'a str> {
    env.iter()
        .rev()
        .find(|(n, _)| n == name)
        .map(|(_, value)| value.as_str())
}

/// Replaces `$(NAME)` by its value; `$$` is a `$`; a name that is not known stays as written.
///
/// Source: Kubernetes `third_party/forked/golang/expansion`.
pub fn expand<'a>(text: &str, value: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(next) = after.strip_prefix('$') {
            out.push('$');
            rest = next;
        } else if let Some((name, next)) = after
            .strip_prefix('(')
            .and_then(|inner| inner.split_once(')'))
        {
            match value(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = next;
        } else {
            // A lone "$", or "$(" without an end.
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Absolute; gantry-rt creates it where the image lacks it.
pub(super) fn working_directory(container: &Container, image: &ImageConfiguration) -> PathBuf {
    let images = image
        .config()
        .as_ref()
        .and_then(|c| c.working_dir().clone());
    let chosen = container
        .working_dir
        .clone()
        .filter(|d| !d.is_empty())
        .or(images);
    PathBuf::from("/").join(chosen.unwrap_or_default())
}
