//! `gantry auth`: who the caller is, and what they may do.
//!
//! `can-i` answers yes (exit code 0) or no (1) on stdout; which binding allows it, or what is missing, goes
//! to stderr. About somebody else it is asked as they (`--as`), as everything is.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::{AccessReviewRequest, AccessRule, AccessRulesRequest, WhoAmIRequest};

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;

#[derive(Subcommand, Debug)]
pub(crate) enum Auth {
    /// Say whether something is allowed
    #[command(name = "can-i")]
    CanI(CanI),
    /// Say who the server takes the caller for
    Whoami,
}

#[derive(Args, Debug)]
pub(crate) struct CanI {
    /// get, list, watch, create, update, patch, delete, or *
    #[arg(required_unless_present = "list")]
    verb: Option<String>,
    /// Kind, kind.group or KIND/NAME; * for all
    #[arg(required_unless_present = "list")]
    resource: Option<String>,
    /// Name of the object
    #[arg(conflicts_with = "list")]
    name: Option<String>,
    /// Part of the object: log, exec, scale, ...
    #[arg(long, default_value = "", hide_default_value = true)]
    subresource: String,
    /// In all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// List everything that is allowed in the namespace
    #[arg(long, conflicts_with_all = ["verb", "resource"])]
    list: bool,
    /// Say nothing: the exit code is the answer
    #[arg(short, long)]
    quiet: bool,
}

impl Auth {
    pub(crate) async fn run(&self, global: &Global) -> Result<ExitCode, Failure> {
        let session = Session::open(global).await?;
        match self {
            Self::CanI(question) if question.list => question.list(&session).await,
            Self::CanI(question) => question.ask(&session).await,
            Self::Whoami => {
                let request = session.request(WhoAmIRequest::default());
                let who = session.access.clone().who_am_i(request).await?.into_inner();
                let rows = [
                    ["ATTRIBUTE".to_owned(), "VALUE".to_owned()].to_vec(),
                    ["Username".to_owned(), who.user].to_vec(),
                    ["Groups".to_owned(), format!("[{}]", who.groups.join(" "))].to_vec(),
                ];
                output::print(&output::table_text(&rows, &[]))?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// A resource as rules name it: group, plural, and the name behind the slash.
#[derive(Debug, PartialEq, Eq)]
struct Resource {
    kind: Option<&'static Kind>,
    group: String,
    plural: String,
    name: String,
}

/// Reads the word that names a resource. What the server has no kind for may still stand in a rule.
fn resource(word: &str) -> Resource {
    let (word, name) = word.split_once('/').unwrap_or((word, ""));
    let kind = resolve(word);
    let (plural, group) = match kind {
        Some(kind) => (kind.plural, kind.group),
        None => word.split_once('.').unwrap_or((word, "")),
    };
    Resource {
        kind,
        group: match plural {
            "*" if group.is_empty() => "*".to_owned(),
            _ => group.to_owned(),
        },
        plural: plural.to_owned(),
        name: name.to_owned(),
    }
}

impl CanI {
    async fn ask(&self, session: &Session) -> Result<ExitCode, Failure> {
        let word = self.resource.as_deref().unwrap_or_default();
        let resource = resource(word);
        if resource.kind.is_none() && resource.plural != "*" && !self.quiet {
            let plural = &resource.plural;
            eprintln!("Warning: the server doesn't have a resource type '{plural}'");
        }
        let in_namespace = resource.kind.is_none_or(|kind| kind.namespaced);
        if !in_namespace && !self.quiet && session.namespace_given {
            eprintln!(
                "Warning: resource '{}' is not namespace scoped",
                resource.plural
            );
        }
        let name = match (&self.name, resource.name.is_empty()) {
            (Some(_), false) => return Err(Failure::local("name the object once")),
            (Some(name), true) => name.clone(),
            (None, _) => resource.name,
        };
        let request = AccessReviewRequest {
            verb: self.verb.clone().unwrap_or_default(),
            group: resource.group,
            resource: resource.plural,
            subresource: self.subresource.clone(),
            namespace: match in_namespace && !self.all_namespaces {
                true => session.namespace.clone(),
                false => String::new(),
            },
            name,
            r#as: None,
        };
        let request = session.request(request);
        let reply = session.access.clone().review(request).await?.into_inner();
        if !self.quiet {
            output::print(if reply.allowed { "yes\n" } else { "no\n" })?;
            eprintln!("{}", reply.reason);
        }
        Ok(match reply.allowed {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }

    async fn list(&self, session: &Session) -> Result<ExitCode, Failure> {
        let request = session.request(AccessRulesRequest {
            namespace: match self.all_namespaces {
                true => String::new(),
                false => session.namespace.clone(),
            },
            r#as: None,
        });
        let reply = session.access.clone().rules(request).await?.into_inner();
        output::print(&output::table_text(&rows(&reply.rules), &[]))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// One row for each resource of each rule.
fn rows(rules: &[AccessRule]) -> Vec<Vec<String>> {
    let header = [
        "RESOURCES",
        "NON-RESOURCE URLS",
        "RESOURCE NAMES",
        "VERBS",
        "BY",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let shown = |values: &[String]| format!("[{}]", values.join(" "));
    for rule in rules {
        let row = |resource: String, urls: &[String]| {
            let (names, verbs) = (shown(&rule.names), shown(&rule.verbs));
            vec![resource, shown(urls), names, verbs, rule.by.clone()]
        };
        for group in &rule.groups {
            rows.extend(rule.resources.iter().map(|resource| {
                let resource = match group.as_str() {
                    "" => resource.clone(),
                    group => format!("{resource}.{group}"),
                };
                row(resource, &[])
            }));
        }
        if !rule.urls.is_empty() {
            rows.push(row(String::new(), &rule.urls));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_read_as_people_write_them() {
        let read = |word| {
            let found = resource(word);
            (found.plural, found.group, found.name)
        };
        let texts = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(read("po"), texts("pods", "", ""));
        assert_eq!(read("deploy/web"), texts("deployments", "apps", "web"));
        assert_eq!(read("*"), texts("*", "*", ""));
        assert_eq!(read("users"), texts("users", "", ""));
        assert_eq!(
            read("tokenreviews.authentication.k8s.io"),
            texts("tokenreviews", "authentication.k8s.io", "")
        );
    }

    #[test]
    fn every_resource_of_a_rule_has_its_row() {
        let rule = AccessRule {
            verbs: vec!["get".to_owned(), "list".to_owned()],
            groups: vec![String::new(), "apps".to_owned()],
            resources: vec!["pods".to_owned()],
            urls: vec!["/api".to_owned()],
            ..AccessRule::default()
        };
        let rows = rows(&[rule]);
        let first: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
        assert_eq!(first, ["RESOURCES", "pods", "pods.apps", ""]);
        assert_eq!(rows[3][1], "[/api]");
        assert_eq!(rows[1][3], "[get list]");
    }
}
