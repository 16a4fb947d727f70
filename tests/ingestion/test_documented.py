"""Every row of the tables in docs/data.md has a test that compares pixels, labels or what is refused."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PIXELS, IMAGES, DECODE = "stream/test_pixels.py", "ingestion/test_images.py", "stream/test_decode.py"
FOLDERS, TABLES = "ingestion/test_folders.py", "ingestion/test_tables.py"
ARCHIVES, ARRAYS, OBJECTS, MEMORY = (
    f"ingestion/test_{name}.py" for name in ("archives", "arrays", "objects", "in_memory")
)
# By the first words of each row, in the order of the page, the file and a test of the row.
ROWS = {
    "JPEG, PNG, WebP of 8 bits": (PIXELS, "ordinary_files_are_stored_as_they_are_and_others_as_equal_pixels"),
    "gray, one bit": (PIXELS, "color_spaces_become_rgb"),
    "BMP, GIF, TIFF": (PIXELS, "ordinary_files_are_stored_as_they_are_and_others_as_equal_pixels"),
    "transparent parts": (PIXELS, "transparent_parts_show_the_background"),
    "TGA or BMP": (PIXELS, "an_alpha_channel_that_a_program_left_at_zero_is_ignored"),
    "orientation": (PIXELS, "orientation_of_exif"),
    "unsigned values": (PIXELS, "unsigned_values_use_the_full_range_of_their_type"),
    "signed values": (IMAGES, "one_range_for_all_frames_of_signed_and_float_values"),
    "TIFF with several": (PIXELS, "bands_of_a_sensor_are_refused"),
    "several pages": (PIXELS, "the_first_page_or_frame_or_all_of_them"),
    "a preview": (PIXELS, "the_preview_inside_a_photo_is_no_image"),
    "HEIC, JPEG XL": (PIXELS, "photos_that_packages_read"),
    "more than": (PIXELS, "one_limit_of_pixels_for_every_format"),
    "extreme shapes": (DECODE, "of_an_extreme_shape_the_middle_is_seen"),
    "damaged, truncated": (PIXELS, "what_is_no_image_is_named"),
    "a web page": (PIXELS, "what_is_no_image_is_named"),
    "class folders": (FOLDERS, "class_folders_in_sorted_order"),
    "one folder called": (FOLDERS, "a_folder_that_is_called_after_its_files_is_no_class"),
    "other files and folders": (FOLDERS, "stray_files_beside_class_folders_are_left_out_and_counted_by_kind"),
    "split folders": (FOLDERS, "splits_and_what_lies_beside_them"),
    "one folder that contains": (FOLDERS, "splits_and_what_lies_beside_them"),
    "masks and other maps": (FOLDERS, "folders_of_masks_are_no_classes"),
    "Pascal VOC": (FOLDERS, "layouts_with_several_objects_in_an_image"),
    "Tiny ImageNet": (FOLDERS, "tiny_imagenet"),
    "Hugging Face's": (FOLDERS, "tables_of_labels_beside_images"),
    "another table": (FOLDERS, "a_table_that_may_hold_labels_is_named"),
    "the output of img2dataset": (FOLDERS, "img2dataset_as_files"),
    "files whose names": (FOLDERS, "files_without_a_telling_name_are_looked_at"),
    "links": (FOLDERS, "links"),
    "names that are not": (FOLDERS, "names_that_are_not_utf_8"),
    "pipes": (FOLDERS, "pipes_are_not_opened"),
    "a folder without read": (FOLDERS, "a_folder_that_may_not_be_read_is_named"),
    "Parquet, Arrow": (TABLES, "arrow"),
    "names of files": (TABLES, "forms_of_csv"),
    "a file that several rows": (TABLES, "a_file_in_several_rows_is_refused"),
    "labels: integers": (TABLES, "label_columns"),
    "null, NaN": (TABLES, "label_columns"),
    "folders such as": (TABLES, "labels_in_the_names_of_folders"),
    "labels that are fractions": (TABLES, "why_a_column_is_not_taken"),
    "no column called": (TABLES, "columns_are_guessed_or_named"),
    "two files with different classes": (TABLES, "files_of_one_split_are_joined_by_the_names_of_classes"),
    "two files with different columns": (TABLES, "files_that_disagree_are_both_named"),
    "splits": (TABLES, "splits_by_name"),
    "a file that is damaged": (TABLES, "damaged_files"),
    "tar, also compressed": (ARCHIVES, "compressed_by_content"),
    "WebDataset": (ARCHIVES, "samples_by_key_with_labels_in_cls"),
    "names with several dots": (ARCHIVES, "keys_with_dots"),
    "a damaged or truncated": (ARCHIVES, "damaged_archives_are_never_shorter_data_sets"),
    "a member with": (ARCHIVES, "members_that_are_no_files_of_the_archive"),
    "several members": (ARCHIVES, "names_in_archives"),
    "`metadata.csv`": (ARCHIVES, "a_table_of_labels_in_an_archive"),
    "a damaged member": (ARCHIVES, "a_damaged_member_of_a_zip_is_a_row_with_a_reason"),
    "MNIST": (ARRAYS, "mnist"),
    "CIFAR-10": (ARRAYS, "cifar"),
    "MDS": (ARRAYS, "forms_that_are_named_and_refused"),
    "Delta": (ARRAYS, "tables_whose_log_says_which_files_are_valid_are_refused"),
    "in Python": (OBJECTS, "a_list_of_files"),
    "a NumPy array": (MEMORY, "the_pixels_of_images_in_memory_arrive"),
    "a list of images": (MEMORY, "labels_of_images_in_memory"),
    "a data set of torch": (MEMORY, "a_data_set_of_torch_names_its_classes"),
    "a `pandas.DataFrame`": (OBJECTS, "a_data_frame"),
    "a `datasets.Dataset`": (OBJECTS, "a_hugging_face_dataset"),
}


def test_every_documented_row_has_a_test() -> None:
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    heads = (" it is stored |", " it is read |")
    rows = [line[2:] for line in lines if line.startswith("| ") and not line.endswith(heads)]
    assert len(rows) == len(ROWS)
    for row, (start, (file, name)) in zip(rows, ROWS.items(), strict=True):
        assert row.startswith(start)
        assert f"def test_{name}(" in (ROOT / "tests" / file).read_text(), start
