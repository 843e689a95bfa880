"""What docs/store.md and docs/training.md promise, beside the tests that break it on purpose.

A promise is a sentence as it stands on the page. Every paragraph, list item and row of the tables
named here holds one or is listed as promising nothing, so that neither page nor tests can drift.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STORE, TRAIN, PRECOMPUTE = "data/store/test_", "train/test_", "precompute/test_"

PROMISES: dict[str, list[tuple[str, str]]] = {
    "store.md": [
        (
            "Every reference scores a response once under a prompt",
            f"{PRECOMPUTE}precompute.py::test_three_references_then_nothing",
        ),
        (
            "none of them scores anything again",
            f"{PRECOMPUTE}responses.py::"
            "test_no_change_of_labels_pairs_or_data_sets_scores_anything_again",
        ),
        (
            "of four ranked responses, which make six pairs, four are scored",
            f"{PRECOMPUTE}responses.py::"
            "test_all_pairings_of_four_responses_are_four_scorings_behind_one_prompt",
        ),
        (
            "`mrpo store status` lists them with `--policies` only",
            f"{STORE}commands.py::test_status_shows_policies_on_request_only",
        ),
        (
            "`mrpo store gc` may always remove them",
            f"{STORE}commands.py::test_gc_may_always_take_the_scores_of_policies",
        ),
        (
            "`verify`, `push` and `pull` ignore them",
            f"{STORE}commands.py::test_the_other_commands_leave_policies_alone",
        ),
        (
            "The store is `store/`, `$MRPO_STORE` or `--store`",
            f"{STORE}commands.py::test_the_store_is_the_flag_then_the_environment_then_a_folder",
        ),
        (
            "Credentials come from the environment, never from the URL, and are never written.",
            f"{STORE}commands.py::test_no_token_reaches_a_manifest_or_the_output",
        ),
        (
            "The tests run a store over the S3 protocol, with 503s, timeouts and dropped "
            "connections",
            f"{STORE}remote.py::test_a_write_outlives_a_fault",
        ),
        (
            "Two scores belong to the same reference exactly when all of this is equal",
            f"{PRECOMPUTE}identity.py::test_what_refs_yaml_says_of_the_scores_is_part_of_it",
        ),
        (
            "a digest of its weight files and `config.json`",
            f"{PRECOMPUTE}identity.py::test_one_changed_byte_is_another_reference",
        ),
        (
            "neither are folder names, data set names, the order of rows, shard sizes or any "
            "training setting",
            f"{PRECOMPUTE}identity.py::test_a_copied_folder_under_another_alias_is_the_same_reference",
        ),
        (
            "neither are folder names, data set names, the order of rows, shard sizes or any "
            "training setting",
            f"{PRECOMPUTE}loop.py::test_scores_do_not_depend_on_shard_size_or_order",
        ),
        (
            "computed again when the file's size, times or inode change",
            f"{PRECOMPUTE}identity.py::"
            "test_a_digest_is_kept_beside_the_stat_and_redone_when_that_changes",
        ),
        (
            "An alias means the newest identity recorded under it with an equal entry in "
            "`refs.yaml`",
            f"{STORE}store.py::test_an_alias_means_the_newest_identity_with_an_equal_entry",
        ),
        (
            "`alias@6f0c` names an identity by its beginning",
            f"{STORE}store.py::test_an_alias_with_prefix_names_one_identity",
        ),
        (
            "keeps the commit of its first scoring until `mrpo precompute --update-refs`",
            f"{PRECOMPUTE}identity.py::test_the_first_commit_is_kept_until_it_is_updated",
        ),
        (
            "The files are plain Parquet with a fixed schema",
            f"{STORE}docs.py::test_the_page_describes_every_column",
        ),
        (
            "A score is finite, or `reason` is set and the log-probs are null: never 0 or NaN.",
            f"{STORE}store.py::test_a_score_is_finite_or_has_its_reason",
        ),
        (
            "A score is finite, or `reason` is set and the log-probs are null: never 0 or NaN.",
            f"{STORE}import_scores.py::test_rows_without_a_score_are_counted_and_never_zero",
        ),
        (
            "No other Parquet file under a store has these columns.",
            f"{STORE}store.py::test_the_store_holds_json_and_parquet_and_no_pickle",
        ),
        (
            "Every reader takes the row whose file sorts first by name",
            f"{STORE}store.py::"
            "test_of_two_rows_for_a_response_the_first_by_file_name_counts_for_every_reader",
        ),
        (
            "Every reader takes the row whose file sorts first by name",
            "data/test_join.py::test_of_two_rows_the_join_takes_the_one_that_every_reader_takes",
        ),
        (
            "*A file that exists is complete.*",
            f"{STORE}faults.py::test_a_writer_killed_around_fsync_and_rename_leaves_all_or_nothing",
        ),
        (
            "on object storage it is a single put",
            f"{STORE}remote.py::"
            "test_a_writer_that_is_cut_off_for_good_in_mid_write_leaves_all_or_nothing",
        ),
        (
            "*Any flipped bit is detected.*",
            f"{STORE}faults.py::test_any_flipped_bit_is_noticed_and_only_its_file_is_set_aside",
        ),
        (
            "`reference.json` contains a digest of itself",
            f"{STORE}store.py::"
            "test_a_record_with_any_flipped_bit_counts_as_none_and_is_written_anew",
        ),
        (
            "sets a damaged file aside as `….bad` and scores its rows again",
            f"{PRECOMPUTE}workers.py::"
            "test_a_damaged_file_is_set_aside_and_its_rows_are_missing_again",
        ),
        (
            "training checks each file that it joins",
            "data/test_join.py::test_a_damaged_score_file_never_reaches_training",
        ),
        (
            "`mrpo store verify` checks all and changes nothing.",
            f"{STORE}commands.py::"
            "test_verify_names_each_damaged_file_exits_1_and_changes_nothing",
        ),
        (
            "*A response that has a row is not scored again under its identity*, whichever pair or "
            "data set it comes from",
            f"{PRECOMPUTE}loop.py::test_what_is_stored_is_not_scored_again_whatever_the_data_set",
        ),
        (
            "a worker looks up which of their responses have no row",
            f"{PRECOMPUTE}responses.py::"
            "test_a_prompt_that_returns_in_a_later_shard_scores_only_what_is_new",
        ),
        (
            "their columns `chosen_id` and `rejected_id` are `response_id`s",
            f"{STORE}docs.py::test_the_duckdb_query_counts_what_the_reference_prefers",
        ),
        (
            "the ids are computed from the texts",
            "data/test_shards.py::test_folders_of_earlier_versions_have_their_response_ids_computed",
        ),
        (
            "A pair has a score under a reference where both of its responses have one",
            "data/test_join.py::test_one_response_without_a_score_leaves_its_pairs_without_one",
        ),
        (
            "is found when scores are joined to pairs and stands in no row",
            "data/test_join.py::test_two_responses_of_the_same_token_ids_make_no_pair",
        ),
        (
            "share the work by file locks, which the system releases when their process ends",
            f"{STORE}faults.py::"
            "test_a_lease_is_held_against_other_processes_and_gone_with_its_own",
        ),
        (
            "Correctness does not depend on them.",
            f"{STORE}faults.py::test_two_processes_share_the_work_and_no_row_stands_twice",
        ),
        (
            "*A full disk or a killed process* loses at most the current shard.",
            f"{STORE}faults.py::test_a_disk_that_fills_in_mid_write_leaves_nothing_half_written",
        ),
        (
            "*A full disk or a killed process* loses at most the current shard.",
            f"{PRECOMPUTE}kills.py::"
            "test_eight_kills_lose_nothing_and_repeat_at_most_a_shard_each",
        ),
        (
            "which readers ignore and `mrpo store gc` removes",
            f"{STORE}faults.py::test_a_temporary_file_left_by_a_kill_is_no_score_file",
        ),
        (
            "*No file contains code*: JSON and Parquet only, no pickle.",
            f"{STORE}store.py::test_the_store_holds_json_and_parquet_and_no_pickle",
        ),
        (
            "Aliases and identities can't name a path outside the store.",
            f"{STORE}store.py::test_an_alias_cannot_leave_the_store",
        ),
        (
            "Aliases and identities can't name a path outside the store.",
            f"{STORE}store.py::test_an_identity_cannot_leave_the_store",
        ),
        (
            "`python benchmarks/kills.py --publish` kills 100 runs",
            f"{PRECOMPUTE}kills.py::"
            "test_eight_kills_lose_nothing_and_repeat_at_most_a_shard_each",
        ),
        (
            "how many of the pairs each lacks",
            f"{STORE}commands.py::"
            "test_status_shows_every_reference_and_what_of_the_pairs_is_missing",
        ),
        (
            "N pairs of each reference scored again and compared",
            f"{PRECOMPUTE}verify.py::test_a_wrong_score_with_a_right_digest_is_found",
        ),
        (
            "references that were replaced and that no run names; with `--delete` removes it",
            f"{STORE}commands.py::test_gc_never_takes_a_reference_that_a_runs_manifest_names",
        ),
        (
            "references that were replaced and that no run names; with `--delete` removes it",
            f"{STORE}commands.py::test_gc_lists_first_and_removes_only_when_told",
        ),
        (
            "copies what the other store lacks and checks each file on the way",
            f"{STORE}commands.py::test_push_leaves_damaged_files_behind_and_says_so",
        ),
        (
            "where a commit holds many files",
            f"{STORE}hub.py::test_many_files_go_into_few_commits_and_the_record_into_the_last",
        ),
        (
            "or beside the `pair_id` of pairs prepared in `--pairs`, with `--by-id`",
            f"{STORE}import_scores.py::test_a_table_by_pair_id_is_enough",
        ),
        (
            "Imported scores are a reference of their own, named by `--alias` and `--model`",
            f"{STORE}import_scores.py::"
            "test_the_same_scores_again_are_already_there_and_another_model_is_another_reference",
        ),
        (
            "An alias that `refs.yaml` does not have refers to them",
            f"{STORE}import_scores.py::"
            "test_trls_columns_become_a_reference_that_joins_like_any_other",
        ),
        (
            "DuckDB: how often each reference prefers the chosen response",
            f"{STORE}docs.py::test_the_duckdb_query_counts_what_the_reference_prefers",
        ),
        (
            "Polars: exactly one row per response, the one that counts",
            f"{STORE}docs.py::test_the_polars_query_takes_each_response_once",
        ),
        (
            "pandas: the responses that a reference could not score, with the reasons.",
            f"{STORE}docs.py::test_the_pandas_query_lists_what_could_not_be_scored",
        ),
        (
            "only where a server's scores could be compared with nothing",
            f"{PRECOMPUTE}server_identity.py::test_what_nothing_can_verify_is_kept_apart_and_doctor_says_so",
        ),
        (
            "16 random pairs are scored through it and compared",
            f"{PRECOMPUTE}server_identity.py::test_a_server_of_quantized_weights_is_refused_before_anything_is_stored",
        ),
        (
            "1/3 to 2 times as far from float32 as engine `hf` itself in that precision",
            f"{PRECOMPUTE}server_identity.py::test_another_precision_than_bfloat16_is_seen",
        ),
        (
            "an answer that is not one log-prob for each token that was sent ends the run",
            f"{PRECOMPUTE}server_engine.py::"
            "test_an_answer_that_is_not_a_log_prob_for_each_token_is_refused_in_one_line",
        ),
        (
            "another engine or a verified server made them, and their pairs are here",
            f"{PRECOMPUTE}server_identity.py::test_a_server_that_agrees_with_the_weights_and_then_with_the_store_is_verified",
        ),
        (
            "Scores that differ are refused, and nothing is stored",
            f"{PRECOMPUTE}server_identity.py::test_a_server_of_quantized_weights_is_refused_before_anything_is_stored",
        ),
        (
            "`train`, `doctor` and all other readers refuse it",
            f"{PRECOMPUTE}shared_store.py::test_an_overwritten_reference_is_refused_by_every_reader",
        ),
        (
            "never get each other's scores, also after a `store pull`",
            f"{STORE}shared_names.py::test_a_pull_of_another_projects_scores_changes_no_name",
        ),
        (
            "Stores of earlier versions have no paths.",
            f"{STORE}shared_names.py::test_records_of_earlier_versions_say_no_folder_and_are_found",
        ),
        (
            "training counts its pairs as missing, with the reason `over_limit`",
            "data/test_join.py::test_pairs_that_a_limit_left_out_are_missing_and_listed",
        ),
        (
            "of two that rounding tells apart, in different pairs of the file, the first counts",
            f"{STORE}import_scores.py::test_a_response_of_several_pairs_is_imported_once",
        ),
        (
            "moves the scores of a store that an earlier version wrote over; nothing is scored",
            f"{STORE}upgrade.py::test_scores_of_pairs_become_those_of_their_responses_each_once",
        ),
        (
            "Every command refuses such a store in one line",
            f"{STORE}upgrade.py::test_every_other_command_refuses_an_old_store_in_one_line",
        ),
        (
            "or by default those that were scored, where they are still there",
            f"{STORE}upgrade.py::test_the_folders_that_were_scored_are_found_by_themselves",
        ),
        (
            "a response that stands in several pairs gets a single row",
            f"{STORE}upgrade.py::test_scores_of_pairs_become_those_of_their_responses_each_once",
        ),
        (
            "A run that was killed leaves a store that is still refused, and the next run finishes "
            "it.",
            f"{STORE}upgrade.py::test_an_upgrade_that_is_killed_is_finished_by_the_next",
        ),
        (
            "with their folder a later run moves them too",
            f"{STORE}upgrade.py::"
            "test_rows_of_pairs_in_no_folder_are_kept_aside_until_their_folder_is_named",
        ),
        (
            "Refusals are counted and not moved",
            f"{STORE}upgrade.py::test_refusals_stay_behind_and_what_a_limit_left_out_is_kept",
        ),
        (
            "`--replace` makes a new identity with the file's scores in place of the stored ones",
            f"{STORE}import_scores.py::test_corrected_scores_are_refused_until_they_may_replace_the_stored_ones",
        ),
    ],
    "training.md": [
        (
            "No reference is loaded.",
            f"{TRAIN}run.py::test_another_beta_scores_nothing_and_opens_no_reference",
        ),
        (
            "`configs/train.yaml` lists every setting with its default.",
            f"{TRAIN}config.py::test_example_has_every_setting_with_its_default_and_a_comment",
        ),
        (
            "are accepted for `--policy`, `--policy-revision`, `--data` and `--lora-rank`",
            "test_bad_input.py::test_flags_of_trl_work_or_say_what_takes_their_place",
        ),
        (
            "the settings in force; `--config` reads it",
            f"{TRAIN}run.py::test_settings_in_force_are_written",
        ),
        (
            "joined once, row for row with the pairs; later changes of the store have no effect",
            "data/test_join.py::"
            "test_a_join_replaces_an_earlier_one_and_the_store_is_not_needed_again",
        ),
        (
            "joined once, row for row with the pairs; later changes of the store have no effect",
            "data/test_join.py::"
            "test_every_row_gets_its_own_scores_whatever_the_order_and_the_files",
        ),
        (
            "a line every `--logging-steps`, a line for each held-out evaluation",
            f"{TRAIN}resume.py::test_undisturbed_log_has_every_step_once",
        ),
        (
            "the latest `--save-total-limit` and the one of best held-out accuracy",
            f"{TRAIN}resume.py::test_last_checkpoints_and_the_best_are_kept",
        ),
        (
            "`mrpo evaluate` adds its own keys",
            "evaluation/test_evaluate.py::test_evaluation_leaves_what_training_wrote",
        ),
        (
            "figures of the final model on all held-out pairs",
            f"{TRAIN}run.py::test_held_out_figures_are_those_of_the_last_evaluation",
        ),
        (
            "the final model: a Hugging Face folder",
            f"{TRAIN}run.py::test_model_folder_loads_and_generates",
        ),
        (
            "or a PEFT adapter with `--lora-rank`",
            f"{TRAIN}run.py::test_lora_trains_an_adapter_that_peft_loads",
        ),
        (
            "The model is written in the dtype of the model that training started from",
            f"{TRAIN}run.py::test_model_keeps_the_dtype_it_came_in",
        ),
        (
            "At its end a run says in a sentence where the log shows a sign of trouble:",
            f"{TRAIN}observations.py::test_a_run_that_ruins_its_policy_says_so",
        ),
        (
            "one reference with nearly all the weight, or clipping that holds all others back",
            f"{TRAIN}observations.py::test_one_reference_decides",
        ),
        (
            "A line is the mean over the pairs since the last one.",
            f"{TRAIN}loop.py::test_line_of_several_steps_is_their_mean",
        ),
        (
            "`--report-to tensorboard,wandb,trackio` sends the same lines there.",
            f"{TRAIN}run.py::test_trackers_get_what_the_log_gets",
        ),
        (
            "share of the time spent waiting for a batch",
            f"{TRAIN}loop.py::test_waiting_and_speed_are_logged",
        ),
        (
            "Names are TRL's",
            f"{TRAIN}run.py::test_the_log_has_the_names_that_the_page_lists",
        ),
        (
            "A pair that the base reference can't score (its `reason` is in the store) is left out "
            "and counted.",
            f"{TRAIN}refusals.py::test_pairs_missing_for_good",
        ),
        (
            "above `--max-missing` of such pairs the run is refused",
            f"{TRAIN}refusals.py::test_pairs_missing_for_good",
        ),
        (
            "is dropped and counted, never truncated",
            f"{TRAIN}stream.py::test_long_pairs_are_dropped_whole_and_counted_once",
        ),
        (
            "The order is a function of `--seed` and the epoch.",
            f"{TRAIN}stream.py::test_order_depends_on_seed_and_epoch_alone",
        ),
        (
            "only the run's last batch may be short",
            f"{TRAIN}stream.py::test_batches_run_on_across_epochs_and_only_the_last_is_short",
        ),
        (
            "and the pairs of each follow each other within a window of 65,536 rows",
            f"{TRAIN}stream.py::"
            "test_by_prompt_the_pairs_of_a_prompt_follow_each_other_within_a_window",
        ),
        (
            "A prompt with many pairs comes no earlier than one with few.",
            f"{TRAIN}stream.py::test_a_prompt_with_many_pairs_comes_no_earlier_than_one_with_few",
        ),
        (
            "A prompt that several pairs of a batch share is computed once, and a response that "
            "stands in several of these pairs once.",
            f"{TRAIN}groups.py::test_a_batch_has_each_prompt_and_each_of_its_responses_once",
        ),
        (
            "Loss and gradient are those of one pair at a time.",
            f"{TRAIN}groups.py::test_loss_and_gradient_are_those_of_one_response_at_a_time",
        ),
        (
            "batches of 64 need 1.04 times fewer under `--shuffle rows`, 3.36 times fewer under "
            "`--shuffle prompts`, and batches of 8 there 2.39 times fewer",
            f"{TRAIN}groups.py::test_tokens_computed_for_ranked_solutions",
        ),
        (
            "A run that can't fit is refused, with the settings under which it would.",
            f"{TRAIN}plan.py::test_what_cannot_fit_is_refused_with_the_ways_out",
        ),
        (
            "It changes the speed, never the loss",
            f"{TRAIN}loop.py::test_what_saves_memory_changes_no_number",
        ),
        (
            "grows on a GPU until memory is nearly full",
            f"{TRAIN}budget.py::test_budget_grows_until_memory_is_nearly_full",
        ),
        (
            "When memory runs out, it is halved and the step repeated.",
            f"{TRAIN}loop.py::test_out_of_memory_halves_the_budget_and_loses_no_step",
        ),
        (
            "without a checkpoint the run starts from the beginning",
            f"{TRAIN}resume.py::test_resume_without_a_checkpoint_begins_at_the_start",
        ),
        (
            "ends the run, with the settings to resume under",
            f"{TRAIN}loop.py::test_a_rank_out_of_memory_says_how_to_go_on",
        ),
        (
            "a finished run is only reported",
            f"{TRAIN}resume.py::test_finished_run_says_so",
        ),
        (
            "the result is bit for bit that of a run that was never stopped, log included",
            f"{TRAIN}resume.py::test_killed_run_ends_as_the_undisturbed_one",
        ),
        (
            "A changed setting is refused by name, unless it does not affect the numbers",
            f"{TRAIN}resume.py::test_changed_setting_is_refused_by_name",
        ),
        (
            "SIGTERM saves at the end of the step and exits with code 143.",
            f"{TRAIN}resume.py::test_sigterm_saves_within_the_step_and_resume_goes_on",
        ),
        (
            "A run whose gradient is no longer finite stops before the update.",
            f"{TRAIN}loop.py::test_stops_before_an_update_that_is_not_finite",
        ),
        (
            "so the loss is that of one process",
            f"{TRAIN}distributed.py::test_curve_is_that_of_one_process",
        ),
        (
            "A checkpoint can be resumed by any number of processes.",
            f"{TRAIN}distributed.py::test_model_is_that_of_one_process",
        ),
        (
            "agree on whether all of them could",
            f"{TRAIN}distributed.py::test_halved_budget_is_that_of_all_ranks",
        ),
        (
            "When the policy is the base reference, its log-probs on up to 64 pairs are "
            "compared",
            f"{TRAIN}refusals.py::test_base_that_differs_from_its_scores_is_said_loudly",
        ),
        (
            "the pairs it was started with, as links, until it is finished",
            f"{TRAIN}changed_pairs.py::test_a_run_ends_on_the_pairs_that_it_started_with",
        ),
        (
            "the run's id in wandb and trackio",
            f"{TRAIN}logs.py::test_runs_of_one_name_are_different_runs_and_a_resumed_one_is_itself",
        ),
        (
            "so the rate ends where its course ends",
            f"{TRAIN}schedule.py::test_the_last_rate_is_the_end_of_the_cosine",
        ),
        (
            "Each share is part of every larger one, and held-out pairs are left alone.",
            f"{TRAIN}label_noise.py::test_a_share_of_prompts_is_drawn_nested_and_anew_for_another_seed",
        ),
        (
            "or whose tokens see later ones, is refused.",
            "model/test_logps.py::test_a_model_that_sees_later_tokens_is_refused",
        ),
        (
            "the number that TRL has with the batch in one micro-batch",
            f"{TRAIN}trl.py::test_a_mixture_of_experts_has_the_balancing_loss_of_trl",
        ),
        (
            "the written model is whole and loads as the original does",
            f"{TRAIN}architectures.py::test_multimodal_gemma3_trains_its_text_model_and_loads_again",
        ),
        (
            "where torch would give up compiling, the run ends with an error",
            "model/test_masks.py::test_what_would_run_uncompiled_is_an_error",
        ),
    ],
}  # fmt: skip

# How paragraphs, list items and table rows begin that promise nothing a test could break.
NO_PROMISE = {
    "store.md": [
        "| adapter |",
        "| tokenizer |",
        "| chat template and",
        "| precision and quantization |",
        "| rendering version |",
        "`mrpo store status` and `reference.json` give the identities",
        "(`store/*/` reads all references",
    ],
    "training.md": [
        "From Python, with the same settings",
    ],
}
ROWS = [(page, *row) for page, rows in PROMISES.items() for row in rows]


def parts_of(page: str) -> list[str]:
    """The paragraphs, list items and table rows of a page, without code and headings.

    The tables of columns and of the log's names are left out: other tests compare them with what
    is written.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|<!-- kills -->.*?<!-- end of kills -->", "", text, flags=re.S)
    text = re.sub(r"^\|.*\n\|[-|]+\|$", "", text, flags=re.M)  # heads of tables
    parts = []
    for section in re.split(r"^#+ ", text, flags=re.M):
        heading, _, rest = section.partition("\n")
        if heading in ("Columns", "The log"):
            rest = re.sub(r"^\|.*$", "", rest, flags=re.M)
        parts += [plain(part) for part in re.split(r"\n\s*\n|\n(?=- |\|)", rest)]
    return [part for part in parts if part]


def plain(text: str) -> str:
    """The text with every white space a space."""
    return " ".join(text.split())


@cache
def page_text(page: str) -> str:
    return plain((ROOT / "docs" / page).read_text(encoding="utf-8"))


@cache
def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}


@pytest.mark.parametrize(("page", "sentence", "test"), ROWS, ids=lambda value: str(value)[-60:])
def test_a_promise_stands_on_its_page_and_has_its_test(page: str, sentence: str, test: str) -> None:
    assert sentence in page_text(page)
    file, name = test.split("::")
    assert name in names_in(ROOT / "tests" / file)


@pytest.mark.parametrize("page", PROMISES)
def test_nothing_on_the_page_is_without_a_promise(page: str) -> None:
    sentences = [sentence for sentence, _ in PROMISES[page]]
    silent = [part for part in parts_of(page) if not any(s in part for s in sentences)]
    listed = NO_PROMISE[page]
    assert [part for part in silent if not part.startswith(tuple(listed))] == []
    assert [begin for begin in listed if not any(p.startswith(begin) for p in silent)] == []
