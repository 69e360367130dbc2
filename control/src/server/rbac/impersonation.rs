//! Impersonation: a caller asks as somebody else, by the metadata `impersonate-user` and
//! `impersonate-group` (Kubernetes' headers).
//!
//! ```text
//!  who the connection proves ─► may impersonate the user? ─► each group? ─► asks as them from here on
//! ```
//! That takes the verb `impersonate` on `users` (or, for a service account's user name, on `serviceaccounts` in
//! its namespace) and on `groups`, each by name. Invariants: nothing of the caller's own rights is left; the
//! identity keeps who really asks, for the audit log; a header that is not understood refuses the request,
//! for without it somebody else would be asking.
//!
//! Source: Kubernetes `staging/src/k8s.io/apiserver/pkg/endpoints/filters/impersonation.go`.

use gantry_api::status::Status;
use tonic::metadata::{KeyRef, MetadataMap};

use super::Attributes;
use crate::server::audit;
use crate::server::identity::Identity;
use crate::server::registry::Registry;
use crate::server::tokens::ACCOUNT_USER_PREFIX;

/// Groups that one request may name.
const GROUP_COUNT_MAX: usize = 64;
const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
/// All of Kubernetes' headers begin with this.
const PREFIX: &str = "impersonate-";

const IMPERSONATE: Attributes<'_> = Attributes {
    verb: "impersonate",
    group: "",
    resource: "",
    subresource: "",
    namespace: "",
    name: "",
};

/// As whom a caller wants to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) user: String,
    pub(crate) groups: Vec<String>,
}

impl Wanted {
    /// What a request's metadata says; none: as themselves.
    pub(crate) fn of(metadata: &MetadataMap) -> Result<Option<Wanted>, Status> {
        let names = metadata.keys().map(|key| match key {
            KeyRef::Ascii(key) => key.as_str(),
            KeyRef::Binary(key) => key.as_str(),
        });
        let mut ours = names.filter(|name| name.starts_with(PREFIX)).peekable();
        if ours.peek().is_none() {
            return Ok(None);
        }
        if let Some(name) = ours.find(|name| *name != USER && *name != GROUP) {
            let text = format!("{name} is not supported: a user and groups can be impersonated");
            return Err(Status::bad_request(text));
        }
        let values = |name: &'static str| {
            let all = metadata.get_all(name).iter();
            all.map(move |value| match value.to_str() {
                Ok(text) => Ok(text.to_owned()),
                Err(_) => Err(Status::bad_request(format!("{name} is no text"))),
            })
        };
        let mut users = values(USER).collect::<Result<Vec<_>, _>>()?;
        let groups = values(GROUP).collect::<Result<Vec<_>, _>>()?;
        if users.len() > 1 {
            return Err(Status::bad_request(format!("{USER} names several users")));
        }
        let user = users.pop().unwrap_or_default();
        Ok(Some(Wanted { user, groups }))
    }
}

/// Namespace and name of the account that a user name means.
fn account_of(user: &str) -> Option<(&str, &str)> {
    user.strip_prefix(ACCOUNT_USER_PREFIX)?.split_once(':')
}

/// The one that is wanted, if the caller may be them. What is refused is noted as the caller's own.
pub(crate) fn assume(
    registry: &Registry,
    who: Identity,
    wanted: Wanted,
) -> Result<Identity, Status> {
    let Wanted { user, mut groups } = wanted;
    if user.is_empty() {
        let text = format!("requested {groups:?} without impersonating a user");
        return Err(Status::bad_request(text));
    }
    if groups.len() > GROUP_COUNT_MAX {
        let text = format!("at most {GROUP_COUNT_MAX} groups can be impersonated at once");
        return Err(Status::bad_request(text));
    }
    let account = account_of(&user);
    let mut needed = vec![match account {
        Some((namespace, name)) => Attributes {
            resource: "serviceaccounts",
            namespace,
            name,
            ..IMPERSONATE
        },
        None => Attributes {
            resource: "users",
            name: &user,
            ..IMPERSONATE
        },
    }];
    needed.extend(groups.iter().map(|name| Attributes {
        resource: "groups",
        name,
        ..IMPERSONATE
    }));
    for what in &needed {
        let result = registry.authorize(&who, what);
        if result.is_err() {
            // What is allowed is noted with the request itself.
            audit::note(registry.audit(), &who, what, &result);
        }
        result?;
    }
    if let (Some((namespace, _)), true) = (account, groups.is_empty()) {
        groups = vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{namespace}"),
        ];
    }
    Ok(Identity {
        user,
        groups,
        impersonated_by: Some(Box::new(who)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::metadata::MetadataMap;

    fn metadata(pairs: &[(&'static str, &str)]) -> MetadataMap {
        let mut map = MetadataMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    #[test]
    fn metadata_names_a_user_and_groups() {
        assert_eq!(Wanted::of(&metadata(&[("user-agent", "x")])), Ok(None));
        let pairs = [(USER, "jane"), (GROUP, "dev"), (GROUP, "ops")];
        let wanted = Wanted::of(&metadata(&pairs)).unwrap().unwrap();
        assert_eq!((wanted.user.as_str(), wanted.groups.len()), ("jane", 2));
        // Groups alone are for the caller to be told about, not to be forgotten.
        let alone = Wanted::of(&metadata(&[(GROUP, "dev")])).unwrap();
        assert_eq!(alone.map(|wanted| wanted.user), Some(String::new()));
    }

    #[test]
    fn what_is_not_understood_refuses_the_request() {
        for pairs in [
            &[(USER, "jane"), (USER, "joe")][..],
            &[(USER, "jane"), ("impersonate-uid", "7")],
            &[(USER, "jane"), ("impersonate-extra-scopes", "view")],
        ] {
            let status = Wanted::of(&metadata(pairs)).unwrap_err();
            assert_eq!(status.code, 400, "{pairs:?}");
        }
    }
}
