use super::*;
use serde_json::{Value, json};

/// A valid Indexed Job with these fields changed; dots separate the steps.
fn job_with(changes: &[(&str, Value)]) -> Job {
    let mut job = json!({
        "metadata": {"name": "j"},
        "spec": {"completions": 5, "parallelism": 2, "completionMode": "Indexed",
            "template": {"spec": {"restartPolicy": "Never",
                "initContainers": [{"name": "init", "image": "i"}],
                "containers": [{"name": "main", "image": "i"}]}}},
    });
    for (path, value) in changes {
        let mut at = &mut job;
        for step in path.split('.') {
            at = &mut at[step];
        }
        *at = value.clone();
    }
    let mut job = serde_json::from_value(job).unwrap();
    crate::defaults::job(&mut job);
    job
}

fn errors(changes: &[(&str, Value)]) -> Vec<String> {
    let errors = job(&job_with(changes));
    errors.iter().map(ToString::to_string).collect()
}

fn on_codes(action: &str, operator: &str, values: Value) -> Value {
    json!({"action": action, "onExitCodes": {"operator": operator, "values": values}})
}

fn on_condition(action: &str, pattern: Value) -> Value {
    json!({"action": action, "onPodConditions": [pattern]})
}

fn failure_policy(rule: Value) -> (&'static str, Value) {
    ("spec.podFailurePolicy", json!({"rules": [rule]}))
}

#[test]
fn what_kubernetes_takes_is_taken() {
    let disrupted = json!({"type": "DisruptionTarget"});
    let mut named = on_codes("FailJob", "In", json!([1, 42]));
    named["onExitCodes"]["containerName"] = json!("init");
    for changes in [
        vec![
            ("spec.backoffLimitPerIndex", json!(0)),
            ("spec.maxFailedIndexes", json!(5)),
        ],
        vec![failure_policy(named)],
        vec![failure_policy(on_codes("Count", "NotIn", json!([0, 1])))],
        vec![failure_policy(on_condition("Ignore", disrupted))],
        vec![
            failure_policy(on_codes("FailIndex", "In", json!([1]))),
            ("spec.backoffLimitPerIndex", json!(1)),
        ],
        vec![(
            "spec.successPolicy",
            json!({"rules": [
            {"succeededIndexes": "0,2-4", "succeededCount": 4}, {"succeededCount": 5},
            {"succeededIndexes": "1"}]}),
        )],
        vec![
            ("spec.completions", json!(2_000_000)),
            ("spec.parallelism", json!(100_000)),
        ],
    ] {
        assert_eq!(errors(&changes), Vec::<String>::new(), "{changes:?}");
    }
}

#[test]
fn defaults_follow_the_policies() {
    let per_index = job_with(&[("spec.backoffLimitPerIndex", json!(1))]);
    assert_eq!(per_index.spec.unwrap().backoff_limit, Some(i32::MAX));
    let rule = on_condition("Ignore", json!({"type": "DisruptionTarget"}));
    let spec = job_with(&[failure_policy(rule)]).spec.unwrap();
    assert_eq!(spec.pod_replacement_policy.as_deref(), Some("Failed"));
    assert_eq!(spec.backoff_limit, Some(6));
    let rules = spec.pod_failure_policy.unwrap().rules;
    let patterns = rules[0].on_pod_conditions.as_ref().unwrap();
    assert_eq!(patterns[0].status.as_deref(), Some("True"));
}

/// Of the errors one is about this field and says this.
fn refused(changes: &[(&str, Value)], field: &str, words: &str) {
    let errors = job(&job_with(changes));
    let mut named = errors.iter().filter(|error| error.field == field);
    let found = named.any(|error| error.body.contains(words));
    assert!(
        found,
        "{changes:?}\nwant {field}: {words}\nhave {errors:#?}"
    );
}

const PER_INDEX: &str = "spec.backoffLimitPerIndex";
const MAX_FAILED: &str = "spec.maxFailedIndexes";

#[test]
fn limits_of_indexes_name_their_fields() {
    let plain = ("spec.completionMode", json!("NonIndexed"));
    let many = ("spec.completions", json!(100_001));
    let one = (PER_INDEX, json!(1));
    let max = |number: i32| (MAX_FAILED, json!(number));
    for (changes, field, words) in [
        (vec![(PER_INDEX, json!(-1))], PER_INDEX, "Invalid value: -1"),
        (vec![one.clone(), max(-1)], MAX_FAILED, "Invalid value: -1"),
        (
            vec![max(1)],
            PER_INDEX,
            "when maxFailedIndexes is specified",
        ),
        (
            vec![one.clone(), max(6)],
            MAX_FAILED,
            "must be less than or equal to completions",
        ),
        (
            vec![plain.clone(), one.clone()],
            PER_INDEX,
            "requires indexed completion mode",
        ),
        (
            vec![plain, max(1)],
            MAX_FAILED,
            "requires indexed completion mode",
        ),
        (
            vec![("spec.completions", Value::Null)],
            "spec.completions",
            "when completion mode is Indexed",
        ),
        (
            vec![("spec.parallelism", json!(100_001))],
            "spec.parallelism",
            "less than or equal to 100000 when completion mode is Indexed",
        ),
        (
            vec![many.clone(), one.clone()],
            MAX_FAILED,
            "must be specified when completions is above 100000",
        ),
        (
            vec![many.clone(), one.clone(), max(10_001)],
            MAX_FAILED,
            "equal to 10000 when completions are above 100000 and used with backoff limit",
        ),
        (
            vec![many, one, max(1), ("spec.parallelism", json!(10_001))],
            "spec.parallelism",
            "equal to 10000 when completions are above 100000",
        ),
        (
            vec![("metadata.name", json!("j".repeat(62)))],
            "metadata.name",
            "will not able to create pod with invalid DNS label",
        ),
    ] {
        refused(&changes, field, words);
    }
}

#[test]
fn every_rule_of_a_pod_failure_policy_names_its_field() {
    let codes = |operator: &str, values: Value| on_codes("Ignore", operator, values);
    let other = json!({"action": "Ignore", "onExitCodes":
        {"operator": "In", "values": [1], "containerName": "other"}});
    let both = json!({"action": "Ignore", "onExitCodes": {"operator": "In", "values": [1]},
        "onPodConditions": [{"type": "A"}]});
    let many = json!({"action": "Ignore", "onPodConditions": vec![json!({"type": "A"}); 21]});
    let condition = |pattern: Value| on_condition("Ignore", pattern);
    for (rule, field, words) in [
        (
            on_codes("", "In", json!([1])),
            ".action",
            r#"valid values: ["Count" "FailIndex" "FailJob" "Ignore"]"#,
        ),
        (
            on_codes("Stop", "In", json!([1])),
            ".action",
            "Unsupported value: \"Stop\"",
        ),
        (
            on_codes("FailIndex", "In", json!([1])),
            ".action",
            "requires the backoffLimitPerIndex to be set",
        ),
        (
            both,
            "",
            "specifying both OnExitCodes and OnPodConditions is not supported",
        ),
        (
            json!({"action": "Ignore"}),
            "",
            "specifying one of OnExitCodes and OnPodConditions is required",
        ),
        (
            codes("", json!([1])),
            ".onExitCodes.operator",
            r#"valid values: ["In" "NotIn"]"#,
        ),
        (
            codes("Like", json!([1])),
            ".onExitCodes.operator",
            "Unsupported value: \"Like\"",
        ),
        (
            codes("In", json!([])),
            ".onExitCodes.values",
            "at least one value is required",
        ),
        (
            codes("In", (1..=256).collect()),
            ".onExitCodes.values",
            "Too many: 256: must have at most 255 items",
        ),
        (
            codes("In", json!([0, 1])),
            ".onExitCodes.values[0]",
            "must not be 0 for the In operator",
        ),
        (
            codes("In", json!([1, 1])),
            ".onExitCodes.values[1]",
            "Duplicate value: 1",
        ),
        (
            codes("In", json!([2, 1])),
            ".onExitCodes.values",
            "[2,1]: must be ordered",
        ),
        (
            other,
            ".onExitCodes.containerName",
            "must be one of the container or initContainer names",
        ),
        (
            condition(json!({"type": "not a type"})),
            ".onPodConditions[0].type",
            "Invalid value: \"not a type\"",
        ),
        (
            condition(json!({"type": "A", "status": "Maybe"})),
            ".onPodConditions[0].status",
            "Unsupported value: \"Maybe\"",
        ),
        (many, ".onPodConditions", "Too many: 21"),
    ] {
        let field = format!("spec.podFailurePolicy.rules[0]{field}");
        refused(&[failure_policy(rule)], &field, words);
    }
    let rules = vec![codes("In", json!([1])); 21];
    let too_many = ("spec.podFailurePolicy", json!({"rules": rules}));
    refused(&[too_many], "spec.podFailurePolicy.rules", "Too many: 21");
    let fine = failure_policy(codes("In", json!([1])));
    for (field, value, words) in [
        (
            "spec.podReplacementPolicy",
            "TerminatingOrFailed",
            "supported values: \"Failed\"",
        ),
        (
            "spec.template.spec.restartPolicy",
            "OnFailure",
            "only \"Never\" is supported when podFailurePolicy is specified",
        ),
    ] {
        refused(&[fine.clone(), (field, json!(value))], field, words);
    }
}

#[test]
fn every_rule_of_a_success_policy_names_its_field() {
    let policy = |rules: Value| ("spec.successPolicy", json!({"rules": rules}));
    let indexes = |text: &str| json!({"succeededIndexes": text});
    let parsing = "error parsing succeededIndexes: ";
    for (rule, field, words) in [
        (
            json!({}),
            "",
            "at least one of succeededCount or succeededIndexes must be specified".to_owned(),
        ),
        (
            json!({"succeededCount": 6}),
            ".succeededCount",
            "equal to 5 (the number of specified completions)".to_owned(),
        ),
        (
            json!({"succeededCount": -1}),
            ".succeededCount",
            "Invalid value: -1".to_owned(),
        ),
        (
            json!({"succeededCount": 3, "succeededIndexes": "0,1"}),
            ".succeededCount",
            "equal to 2 (the number of indexes in the specified".to_owned(),
        ),
        (
            indexes("0-5"),
            ".succeededIndexes",
            format!("{parsing}too large index: \"5\""),
        ),
        (
            indexes("2,1"),
            ".succeededIndexes",
            format!("{parsing}non-increasing order, previous: 2, current: 1"),
        ),
        (
            indexes("3-2"),
            ".succeededIndexes",
            format!("{parsing}non-increasing order, previous: 3, current: 2"),
        ),
        (
            indexes("1-2-3"),
            ".succeededIndexes",
            format!("{parsing}the fragment \"1-2-3\""),
        ),
        (
            indexes("a"),
            ".succeededIndexes",
            format!("{parsing}cannot convert string to integer for index: \"a\""),
        ),
        (
            indexes(&"1,".repeat(32_769)),
            ".succeededIndexes",
            "Too long".to_owned(),
        ),
    ] {
        let field = format!("spec.successPolicy.rules[0]{field}");
        refused(&[policy(json!([rule]))], &field, &words);
    }
    let rules = "spec.successPolicy.rules";
    refused(&[policy(json!([]))], rules, "at least one rules must be");
    let many = json!(vec![json!({"succeededCount": 1}); 21]);
    refused(&[policy(many)], rules, "Too many: 21");
    let plain = ("spec.completionMode", json!("NonIndexed"));
    let words = "requires indexed completion mode";
    let one = policy(json!([{"succeededCount": 1}]));
    refused(&[plain, one], "spec.successPolicy", words);
}

#[test]
fn policies_and_limits_of_indexes_never_change() {
    let per_index = [
        ("spec.backoffLimitPerIndex", json!(1)),
        ("spec.maxFailedIndexes", json!(1)),
    ];
    let old = job_with(&per_index);
    let changed = |change: (&'static str, Value)| {
        let mut changes = per_index.to_vec();
        changes.push(change);
        let errors = job_update(&job_with(&changes), &old);
        errors
            .into_iter()
            .map(|error| error.field)
            .collect::<Vec<_>>()
    };
    let success = json!({"rules": [{"succeededCount": 1}]});
    for (change, field) in [
        (("spec.successPolicy", success), "spec.successPolicy"),
        (
            ("spec.backoffLimitPerIndex", json!(2)),
            "spec.backoffLimitPerIndex",
        ),
        (
            failure_policy(on_codes("Ignore", "In", json!([1]))),
            "spec.podFailurePolicy",
        ),
        (("spec.completions", json!(6)), "spec.completions"),
    ] {
        assert_eq!(changed(change), [field]);
    }
    assert_eq!(
        changed(("spec.maxFailedIndexes", json!(2))),
        Vec::<String>::new()
    );
    assert_eq!(
        changed(("spec.completions", json!(2))),
        Vec::<String>::new(),
        "with its parallelism"
    );
}
